"""Losses as modules: `Loss` holds a function of kdfast with its settings, others hold parameters too. And linear layers
of which a part lives."""

from kdfast.nn.block_sparse import BlockSparseLinear
from kdfast.nn.hidden import HiddenMSELoss
from kdfast.nn.loss import Loss
from kdfast.nn.pruned import PrefixLinear, SelectedLinear

__all__ = ["BlockSparseLinear", "HiddenMSELoss", "Loss", "PrefixLinear", "SelectedLinear"]
