"""What weights begin with that nobody has trained."""

from torch import Tensor, nn


def fill_normal(weight: Tensor, std: float) -> None:
    """Random values, if they are anywhere: for a weight on the meta device, as those of a file begin, torch would
    import its compiler, which takes more of a processor than torch itself."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)
