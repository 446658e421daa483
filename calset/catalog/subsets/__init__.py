"""Named, versioned, content-hashed lists of calibration samples: recipes, text corpora, versions, folders, manifests.

Must not know the Hub.
"""
