"""Frame packs: WebDataset tar shards and a columnar index."""
