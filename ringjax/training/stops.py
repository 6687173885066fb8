"""The ways a run ends before its last step."""


class Preempted(RuntimeError):
    """SIGTERM or SIGINT arrived; the state was saved and the same command goes on from there."""


class BadLoss(RuntimeError):
    """The loss is NaN or jumped; nothing of it was saved, and the batch was written down."""
