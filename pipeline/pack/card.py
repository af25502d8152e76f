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
        f"- `{source.location}` ({source.kind}, {source.revision[:16]}): "
        + ", ".join(f"{name} {value}" for name, value in source.details.items())
        for source in info.request.sources
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
- {_rows(info)}; {contract.control_rate_hz} Hz.

Sources:
{sources}
{_left_out(info)}
Open it with plain `tar`, with `webdataset.WebDataset("shards/000000.tar")`, or with
`geomcache.pipeline.pack.reader.PackReader`; `rows.arrow` and `episodes.arrow` are Arrow IPC files
(`pyarrow.ipc.open_file`).
"""


def _rows(info: PackInfo) -> str:
    """What a row's step and actions are."""
    steps = info.steps
    text = "Row t holds the observation before action t"
    if steps is not None and steps.per_row > 1:
        text = (
            f"Only one in {steps.per_row} control steps was observed: row r of an episode holds the observation before "
            f"control step {steps.per_row} r (`step`) and the `actions` of {steps.per_row} steps from there on; "
            f"{steps.total} control steps in all"
        )
    if steps is not None and steps.perturbed is not None:
        text += (
            f". Actions are the demonstrator's answers; in {steps.perturbed} control steps (`perturbed`) a push was "
            "added to what was executed, and what was answered after it counts in no chunk that begins before it"
        )
    return text


def _left_out(info: PackInfo) -> str:
    """What the sources hold and the pack does not."""
    lines = []
    if info.request.no_ops is not None:
        lines.append(
            f"No-op filter: {info.no_op_rows} rows with a motion below {info.request.no_ops.threshold:g} and an "
            "unchanged gripper are left out."
        )
    if info.left_out:
        lines.append(f"{len(info.left_out)} episodes are left out:\n")
        lines += [f"- {one.where}: {one.why}" for one in info.left_out]
    return "\n".join(["", *lines, ""]) if lines else ""
