"""The frozen part's output, computed once and cached on the device, in host memory or on disk."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agnews_dist.features.manager import FeatureCache

__all__ = ["FeatureCache"]


def __getattr__(name: str) -> Any:
    # Imported at the first use, as placement.py and eviction.py must not load torch.
    if name == "FeatureCache":
        from agnews_dist.features.manager import FeatureCache

        return FeatureCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
