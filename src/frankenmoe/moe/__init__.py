"""The running MoE as torch modules: router, dispatch, block, adapters, trace, loading. Writes nothing."""
