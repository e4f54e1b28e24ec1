"""Modules that hold an operator's settings: the twins of the functions in `kdfast`."""

from kdfast.nn.divergences import (
    JSDivLoss,
    KDLoss,
    KLDivLoss,
    LogitMSELoss,
    ReverseKLDivLoss,
    SkewKLDivLoss,
    SkewReverseKLDivLoss,
    SoftCrossEntropyLoss,
    SymmetricKLDivLoss,
    TotalVariationLoss,
)
from kdfast.nn.layers import (
    AttentionKLLoss,
    AttentionMSELoss,
    CLSDistanceLoss,
    CosineDistanceLoss,
    HiddenMSELoss,
    QKAttentionMSELoss,
    QKRelationKLLoss,
)
from kdfast.nn.linear import LinearKDLoss, LinearTopkKDLoss, TopkKLDivLoss

__all__ = [
    "AttentionKLLoss",
    "AttentionMSELoss",
    "CLSDistanceLoss",
    "CosineDistanceLoss",
    "HiddenMSELoss",
    "JSDivLoss",
    "KDLoss",
    "KLDivLoss",
    "LinearKDLoss",
    "LinearTopkKDLoss",
    "LogitMSELoss",
    "QKAttentionMSELoss",
    "QKRelationKLLoss",
    "ReverseKLDivLoss",
    "SkewKLDivLoss",
    "SkewReverseKLDivLoss",
    "SoftCrossEntropyLoss",
    "SymmetricKLDivLoss",
    "TopkKLDivLoss",
    "TotalVariationLoss",
]
