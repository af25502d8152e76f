"""Token caches on disk: sharded Zarr v3, commit records, manifest."""
