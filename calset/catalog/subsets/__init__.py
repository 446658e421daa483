"""Named, versioned, content-hashed lists of calibration samples: select, compare, write to a folder, read back.

Must not know the Hub.
"""
