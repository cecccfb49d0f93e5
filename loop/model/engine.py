"""A DeepSpeed engine made ready for the loop: full weights on each rank, CUDA graphs, packing."""

import numpy as np

from ..config.schema import Config
from ..data.batch_plan import BatchPlan, PackingSpec
from ..distributed.timeline import timed
from ..distributed.world import Ranks
from ..zero3.hooks import cache_module_parameters
from ..zero3.replicated import replicate_weights
from .build import Execution
from .flops import attention_pair_cost
from .replay import replay_layers
from .structure import context_length


@timed("CUDA graphs")
def prepare_engine(
    engine,
    execution: Execution,
    config: Config,
    model_config,
    plan: BatchPlan,
    lengths: np.ndarray,
    ranks: Ranks,
) -> tuple[PackingSpec, list[str]]:
    """Replicates weights and captures CUDA graphs where `execution` says so.

    Every rank must call it, after a checkpoint was restored. Returns how steps are packed from now
    on, and what a person should know.

    Args:
        model_config: the base's transformers configuration.
        lengths: int [n], tokens of each training example.
    """
    # Padding must not count further than the base does.
    max_seq_len = min(config.max_seq_len, context_length(model_config) or config.max_seq_len)
    cache_module_parameters()
    if execution.replicated:
        replicate_weights(engine, ranks)
    max_tokens = execution.max_tokens
    padded_shape = None
    warnings = list(execution.warnings)
    if execution.use_cuda_graphs:
        max_tokens, padded_shape, warning = replay_layers(
            max_seq_len, engine.module, plan, lengths, max_tokens, execution.dropout, ranks
        )
        warnings += ranks.all_gather_json(warning)
    # Ranks wait for each other, so attention counts where rows have sizes of their own. Padded rows
    # all take the same time; they should be short instead.
    balanced = ranks.world_size > 1 and not padded_shape
    pair_cost = attention_pair_cost(engine.module, model_config) if balanced else 0.0
    return PackingSpec(max_tokens, max_seq_len, pair_cost, padded_shape), warnings
