"""The devices that a command writes with."""

import dataclasses
from typing import Literal

from ringjax.models.parallel import Parallel
from ringjax.training.mesh import check_shape, make_mesh, simulate_devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnMesh:
    """Where the model and its cache lie."""

    mesh: str | None = None
    """dp,fsdp,tp,sp, such as 1,1,1,8 for a cache cut over eight devices; null: one device."""
    layout: Literal["striped", "zigzag", "contiguous"] = "striped"
    """Which token sits on which device."""
    simulated_devices: int = 0
    """CPU devices to simulate where there is no accelerator, 0: none."""

    def check_mesh(self) -> None:
        """Raises ValueError for a mesh that is none."""
        if self.mesh is not None:
            check_shape(self.mesh)
        if self.simulated_devices < 0:
            raise ValueError(f"simulated_devices {self.simulated_devices} must be 0 or more")

    def parallel(self) -> Parallel:
        """The devices; call it before JAX's first use where some are simulated."""
        simulate_devices(self.simulated_devices)
        return Parallel() if self.mesh is None else Parallel(make_mesh(self.mesh), self.layout)
