"""Partitioning a module's parameters before there is an engine."""

import deepspeed
import torch.nn as nn
from deepspeed.utils import groups


def partition_module(module: nn.Module, ds_config: dict) -> None:
    """Leaves each rank with its shards of the module's own parameters. Every rank must call it.

    A module that has been partitioned already is left alone. This is `deepspeed.zero.Init` as the
    engine would call it later; the group of ranks comes from a private function (DeepSpeed 0.19.8).
    """
    # None at first, and without zero_hpz_partition_size.
    intra_group = groups._get_zero_param_intra_parallel_group()
    deepspeed.zero.Init(
        module=module, config_dict_or_path=ds_config, zero_param_parallel_group=intra_group
    )
