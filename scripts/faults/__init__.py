"""The kinds of faults that scripts/fault_campaign.py tries."""


def kinds() -> list:
    """All kinds, in the order in which they are tried."""
    from faults import checkpoints, data, disks, kills, numbers, peers

    modules = (kills, peers, disks, checkpoints, data, numbers)
    return [kind for module in modules for kind in module.KINDS]
