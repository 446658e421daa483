"""Which stored tensors make which parameters of a model, in both directions.

transformers renames, merges and splits tensors as it loads a checkpoint (every expert is a tensor in Mixtral's files
and a slice of one parameter in its model). Its own rules are asked here, so that any model that it loads can be loaded
block by block, and a pruned parameter finds its way back to the names of the checkpoint. It must not know methods.

What is pruned is the checkpoint's matrix: what a file keeps as a matrix of its own competes for zeros on its own,
whatever a version of transformers merges it with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calset.errors import InputError, first_line
from calset.pruning.model.decoder import Block, Weight, surroundings
from calset.pruning.model.memory import ran_out
from calset.pruning.model.tensorfiles import DTYPES, Stored, TensorFiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a checkpoint, and where it is in the model.

    ``name``: its stored tensor; of a 3-D one it is slice ``expert``; ``rows``: its outputs there, when it shares the
    tensor with others; ``transposed``: stored as inputs x outputs. ``shape``: outputs x inputs.
    ``weight``, ``in_expert`` and ``in_rows``: the parameter, its slice and the rows of it that hold this matrix.
    """

    name: str
    shape: tuple[int, int]
    expert: int | None
    rows: tuple[int, int] | None
    transposed: bool
    weight: Weight
    in_expert: int | None
    in_rows: tuple[int, int]

    @property
    def label(self) -> str:
        """For messages and options: the stored name, with the expert and the rows where it is not the whole tensor."""
        return label(self.name, self.expert, self.rows)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.name, self.expert, self.rows, self.transposed)

    @property
    def reads(self) -> str:
        return self.weight.reads(self.in_expert)

    def values(self) -> Tensor:
        """A view of it in the model, outputs x inputs."""
        return self.weight.matrix(self.in_expert)[slice(*self.in_rows)]


def label(name: str, expert: int | None, rows: Sequence[int] | None) -> str:
    """A stored tensor's name, with the expert and the rows where a matrix is not all of it."""
    return name + ("" if expert is None else f"[{expert}]") + ("" if rows is None else f"[{rows[0]}:{rows[1]}]")


def cut(tensor: Tensor, expert: int | None, rows: Sequence[int] | None, transposed: bool) -> Tensor:
    """The matrix (outputs x inputs) that a stored tensor holds at a place that ``Matrix`` describes."""
    matrix = tensor if expert is None else tensor[expert]
    matrix = matrix.T if transposed else matrix
    return matrix if rows is None else matrix[rows[0] : rows[1]]


@dataclass(slots=True)
class Layout:
    """The checkpoint in ``files`` as ``model`` (on the meta device or not) takes it.

    ``target``: stored name -> the (first) parameter that it goes into. ``plain``: parameters that are a stored tensor
    under another name at most.
    """

    files: TensorFiles
    model: Any
    rules: Sequence[Any]
    target: Mapping[str, str]
    plain: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, files: TensorFiles, model: Any) -> Layout:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(model)
        renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        converters = [r for r in rules if isinstance(r, WeightConverter)]
        known, prefix = model.state_dict(), model.base_model_prefix
        target, plain = {}, {}
        for name in files.stored:
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if renamed not in known and name in known:
                renamed, pattern = rename_source_key(name, [], [], prefix, known)
            if renamed in known:
                target[name] = renamed
                if pattern is None:
                    plain[renamed] = name
        # What saving reverses: only the rules that met a tensor (transformers keeps the same list).
        model._weight_conversions = [r for r in rules if r.was_used()]
        return cls(files, model, rules, target, plain)

    # --- in -----------------------------------------------------------------------------------------------------

    def names(self, prefix: str) -> list[str]:
        """Stored tensors that go into parameters under ``prefix``."""
        return [name for name, target in self.target.items() if target.startswith(prefix)]

    def load(self, names: Iterable[str], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """Put these stored tensors into the model, as transformers would.

        Raises:
            InputError: the files do not fit the model, or cannot be read.
        """
        info = self._convert({name: self.files.slice(name) for name in names}, dtype, device)
        self.files.release()
        _refuse(info, self.files, missing=())

    def load_surroundings(self, blocks: Sequence[Block], dtype: torch.dtype, device: torch.device) -> None:
        """Load what runs before the first block; see ``decoder.surroundings``."""
        around = surroundings(self.model, blocks)
        self.load([name for name, target in self.target.items() if target in around], dtype, device)

    def check(self, dtype: torch.dtype, absent: Collection[str] = ()) -> None:
        """Try the whole load on the meta device: ``model`` must be there, and stays there.

        Args:
            absent: parameters that the checkpoint need not hold.

        Raises:
            InputError: tensors that the checkpoint lacks, or of other shapes than the model's.
        """
        import torch

        names = self.target
        tensors = {n: torch.empty(s.shape, device="meta", dtype=_dtype(s)) for n, s in self.files.stored.items()}
        info = self._convert({n: tensors[n] for n in names}, dtype, "meta")
        self.model._adjust_missing_and_unexpected_keys(info)
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [
            n for n in info.missing_keys if n not in absent and not (n in tied and tied[n] not in info.missing_keys)
        ]
        _refuse(info, self.files, missing=sorted(missing))

    def _convert(self, tensors: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str) -> Any:
        import torch
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        used = self.model._weight_conversions
        settings = LoadStateDictConfig(
            device_map={"": str(device)},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=list(self.rules),
        )
        try:
            with quiet(), torch.no_grad():
                info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), settings)
        except Exception as error:
            if ran_out(error):
                raise  # no fault of the files
            raise InputError(f"cannot load the weights of {self.files.folder}: {first_line(error)}") from error
        finally:
            self.model._weight_conversions = used
        return info

    # --- out ----------------------------------------------------------------------------------------------------

    def to_stored(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name -> the stored tensors that they make, one by one: the way back copies.

        Raises:
            InputError: transformers has no way back to a name of the checkpoint's.
        """
        merged = {n: t for n, t in parameters.items() if n not in self.plain}
        for name, tensor in parameters.items():
            if name in self.plain:
                yield self.plain[name], tensor
        # Parameters that are parts of one stored tensor only go back together.
        alone = merged.keys() <= set(self.target.values())
        for part in [{n: t} for n, t in merged.items()] if alone else [merged]:
            yield from self._revert(part).items()

    def _revert(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        if not parameters:
            return {}
        try:
            with quiet():
                reverted = revert_weight_conversion(self.model, parameters)
        except Exception as error:
            raise InputError(
                f"transformers cannot turn {next(iter(parameters))} back into the tensors of {self.files.folder}: "
                f"{first_line(error)}"
            ) from error
        return {self._stored_name(name): tensor for name, tensor in reverted.items()}

    def _stored_name(self, name: str) -> str:
        prefix = f"{self.model.base_model_prefix}."
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in self.files.stored:
                return candidate
        raise InputError(f"transformers would save {name}, which {self.files.folder} does not hold: cannot prune it")

    def matrices(self, weights: Iterable[Weight]) -> list[Matrix]:
        """The matrices of the checkpoint that these weights hold, in the order of the weights.

        How: the way back is asked to carry numbered rows, so that each stored row says where it comes from.

        Raises:
            InputError: a weight that the files keep in a form that calset cannot follow.
        """
        listed = list(weights)
        labels = {w.name: _labels(i, w) for i, w in enumerate(listed)}
        found: list[tuple[int, Matrix]] = []
        for name, tensor in self.to_stored(labels):
            stored = self.files.stored[name]
            if stored.dtype not in DTYPES:
                raise InputError(
                    f"{name} of {self.files.folder} is stored as {stored.dtype}: prune a checkpoint of "
                    f"{', '.join(DTYPES)}"
                )
            found.extend(_matrices(name, stored, tensor, listed))
        return [m for _, m in sorted(found, key=lambda x: x[0])]


SPAN = 1 << 40  # labels of one weight; more rows than any has


def _labels(index: int, weight: Weight) -> Tensor:
    """A stand-in for a weight with two inputs, whose values number its rows, over all experts."""
    import torch

    rows = weight.shape[0]
    n = weight.n_experts or 1
    numbers = index * SPAN + torch.arange(n * rows).reshape(n, rows, 1).expand(n, rows, 2)
    tensor = numbers if weight.n_experts is not None else numbers[0]
    return tensor.transpose(-1, -2) if weight.transposed else tensor


def _matrices(name: str, stored: Stored, labels: Tensor, weights: Sequence[Weight]) -> list[tuple[int, Matrix]]:
    """The matrices of one stored tensor, each with its first label for their order."""
    slices: list[tuple[int | None, Tensor]] = [(None, labels)]
    if len(stored.shape) == 3:
        slices = list(enumerate(labels.reshape(stored.shape[0], *labels.shape[-2:])))
    shape = stored.shape[-2:]
    found = []
    for expert, part in slices:
        numbers, transposed = _row_numbers(part)
        runs = _runs(numbers, weights)
        for (index, in_expert, start, stop), rows in runs:
            width = weights[index].shape[1]
            if shape != ((width, len(numbers)) if transposed else (len(numbers), width)):
                raise InputError(f"{name} is stored as {stored.shape}: calset cannot tell its rows from its columns")
            matrix = Matrix(
                name=name,
                shape=(stop - start, width),
                expert=expert,
                rows=None if len(runs) == 1 else rows,
                transposed=transposed,
                weight=weights[index],
                in_expert=in_expert,
                in_rows=(start, stop),
            )
            found.append((int(numbers[rows[0]]), matrix))
    return found


def _row_numbers(part: Tensor) -> tuple[list[int], bool]:
    """The numbers of a stored matrix's rows, and whether they lie along its columns."""
    if part.ndim < 2:  # transformers squeezes what it splits: a single row
        return [int(part.reshape(-1)[0])], False
    if part.shape[1] == 2 and bool((part[:, 0] == part[:, 1]).all()):
        return part[:, 0].tolist(), False
    return part[0].tolist(), True


def _runs(
    numbers: Sequence[int], weights: Sequence[Weight]
) -> list[tuple[tuple[int, int | None, int, int], tuple[int, int]]]:
    """((weight, expert, first row, row after the last) in the model, the rows' place in the file) of each stretch."""
    places = []
    for number in numbers:
        index, row = divmod(number, SPAN)
        expert, row = divmod(row, weights[index].shape[0])
        places.append((index, expert if weights[index].n_experts is not None else None, row))
    runs, start = [], 0
    for i in range(1, len(places) + 1):
        if i == len(places) or places[i][:2] != places[start][:2]:
            rows = sorted(row for _, _, row in places[start:i])
            if rows != list(range(rows[0], rows[-1] + 1)):
                raise InputError(
                    f"the rows of {weights[places[start][0]].name} lie apart in the files: cannot prune it"
                )
            runs.append(((*places[start][:2], rows[0], rows[-1] + 1), (start, i)))
            start = i
    return runs


def _dtype(stored: Stored) -> Any:
    import torch

    # What is no plain float is either not pruned or refused by name; its width does not matter on the meta device.
    return stored.torch_dtype if stored.dtype in DTYPES else torch.uint8


def _refuse(info: Any, files: TensorFiles, missing: Sequence[str]) -> None:
    if info.conversion_errors:
        name, reason = next(iter(info.conversion_errors.items()))
        raise InputError(f"cannot load the weights of {files.folder}: {name}: {str(reason).splitlines()[0]}")
    if info.mismatched_keys:
        name, got, want = sorted(info.mismatched_keys)[0]
        raise InputError(
            f"cannot load the weights of {files.folder}: {name} is {tuple(got)}, the config asks for {tuple(want)}"
        )
    if missing:
        # transformers would go on with random ones.
        raise InputError(f"the checkpoint of {files.folder} lacks {len(missing)} tensors, such as {missing[0]}")


@contextmanager
def quiet():
    """transformers draws progress bars of its own; calset's caller decides what is shown."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def parameters_on_meta():
    """Build modules in here with parameters on the meta device and buffers where they are computed.

    Why: a model's own code computes its buffers (rotary frequencies), and no checkpoint holds them.
    """
    import torch
    from torch import nn

    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # One that is there already stays the same object: it may be tied.
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def unload(module: nn.Module) -> None:
    """Give up a module's parameters: what remains is their shape."""
    import torch
    from torch import nn

    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def place(module: nn.Module, device: torch.device) -> None:
    """Move what a module holds to a device; parameters that are not loaded stay where they are."""
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            part._buffers[name] = buffer.to(device)
        for parameter in part.parameters(recurse=False):
            if parameter.device.type != "meta":
                parameter.data = parameter.data.to(device)
