"""The devices that a command works with, of this process alone or of several."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from ringjax.models.parallel import Parallel
from ringjax.training import agreement, distributed
from ringjax.training.config import DistributedConfig
from ringjax.training.mesh import check_shape, make_mesh, simulate_devices
from ringjax.training.peers import Watch

# What each process may have been told otherwise.
_OWN = ("progress",)
_command: contextvars.ContextVar[tuple[contextlib.ExitStack, str] | None] = contextvars.ContextVar(
    "command", default=None
)


@contextlib.contextmanager
def watched(goes_on: str) -> Iterator[None]:
    """Around a command: where it joins other processes, one that is lost ends it with a line and exit code 69.

    `goes_on` says what the same command does when it is run again.
    """
    with contextlib.ExitStack() as stack:
        before = _command.set((stack, goes_on))
        try:
            yield
        finally:
            _command.reset(before)


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
        """The devices; call it before JAX's first use where some are simulated or several processes share them.

        Raises as `join`.
        """
        join(self, self.facts)
        return Parallel() if self.mesh is None else Parallel(make_mesh(self.mesh), self.layout)

    def facts(self) -> dict[str, str]:
        """What must be the same on all processes beside the options: fingerprints of files by name."""
        return {}


def join(config: Any, facts: Callable[[], dict[str, str]]) -> None:
    """Join the other processes of a command, if there are any, and see that all were asked for the same.

    `config` has the fields mesh and simulated_devices. A cluster is looked for where there is a mesh; without one only
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID count. Raises ConfigError that names the hosts whose
    versions, options, devices or files differ, ValueError for several processes without a mesh.
    """
    simulate_devices(config.simulated_devices)
    distributed.start(DistributedConfig(detect=config.mesh is not None))
    agreement.require_same("versions and options", lambda: agreement.software() | agreement.settings(config, _OWN))
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    if config.mesh is None:
        raise ValueError(
            f"{jax.process_count()} processes and no mesh, so each would do all of the work: name the devices that"
            " share it, such as --mesh 1,1,1,-1, or start one process"
        )
    agreement.require_same("devices", agreement.devices)
    agreement.require_same("files", facts)
    if (command := _command.get()) is not None:
        stack, goes_on = command
        stack.enter_context(Watch(DistributedConfig(), goes_on=goes_on))
