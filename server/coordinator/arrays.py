"""The array types of the coordinator. Shapes stand beside names, in these letters:

B rows of a tick, S slots, E experts, K top-k, X exact ids of a row, U candidates of a row, V vocabulary, d projected
size.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
