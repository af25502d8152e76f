"""What stands on disk: keys, specs, contracts, fingerprints, manifests. Imports no torch, ray or zarr."""
