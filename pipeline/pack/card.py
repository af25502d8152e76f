"""The data card that stands in a pack as README.md."""

from geomcache.cache_schemas.pack_info import PackInfo


def data_card(info: PackInfo) -> str:
    """A page a person can read: what is inside, its conventions, how to open it."""
    contract = info.contract
    cameras = "\n".join(
        f"| {number} | {camera.name} | {camera.height} x {camera.width} |"
        for number, camera in enumerate(contract.cameras)
    )
    sources = "\n".join(
        f"- `{source.location}` ({source.kind}, {source.revision[:16]})" for source in info.request.sources
    )
    depth = (
        "Metric depth (float32 metres) and camera matrices (camera-to-robot-base, OpenCV axes) for every view."
        if contract.has_depth
        else "No depth."
    )
    return f"""# LIBERO frame pack

{info.rows} rows (one row = one time step, all views) of {info.episodes} episodes in {len(info.shards)} shards
of {info.request.rows_per_shard} rows. Digest `{info.digest}`.

| view | camera | pixels |
|---|---|---|
{cameras}

- Images: RGB PNG, {contract.image_orientation} (row 0 is up; not mirrored). {depth}
- State: `{contract.state_layout}`; action: `{contract.action_layout}`, gripper `{contract.gripper_sign}`.
- Row t holds the observation before action t; {contract.control_rate_hz} Hz.

Sources:
{sources}

Open it with plain `tar`, with `webdataset.WebDataset("shards/000000.tar")`, or with
`geomcache.pipeline.pack.reader.PackReader`; `rows.arrow` and `episodes.arrow` are Arrow IPC files
(`pyarrow.ipc.open_file`).
"""
