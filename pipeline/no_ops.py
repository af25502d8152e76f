"""The community's no-op filter: rows in which the arm is told to stay and the gripper to keep what it does.

Rule (OpenVLA's regenerate_libero_dataset.py): an action is a no-op when the norm of its six motion numbers is below the
threshold and its gripper command equals that of the last action that was KEPT; before any is kept, the norm decides
alone. OpenVLA replays without the no-ops, which hardly moves the scene; here rows of the recording are left out.
"""

import numpy as np
from numpy.typing import NDArray


def rows_kept(actions_TA: NDArray[np.floating], threshold: float) -> NDArray[np.int64]:
    """Indices of the rows that are no no-ops, in order; ``actions_TA`` [T, 7] in the simulator's convention."""
    moves = np.linalg.norm(actions_TA[:, :6].astype(np.float64), axis=1) >= threshold
    kept: list[int] = []
    for row, gripper in enumerate(actions_TA[:, 6]):
        if moves[row] or (kept and gripper != actions_TA[kept[-1], 6]):
            kept.append(row)
    return np.array(kept, dtype=np.int64)
