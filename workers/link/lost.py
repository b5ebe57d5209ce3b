"""What is raised where a peer is gone. No torch in here: whoever watches the workers, without it, catches these."""


class PeerLostError(ConnectionError):
    """A process at the other end died, closed its side, or has not answered for too long."""


class RankLostError(RuntimeError):
    """A further rank of the drafter died or is silent. The DraftWorker that says so is lost with it, where a
    PeerLostError is a complaint about somebody else."""


class LinkLostError(PeerLostError):
    """Rank 0 of the target has lost its DraftWorker; the group of the ranks is whole."""
