"""The MoE as torch modules: router, dispatch, block, adapters, trace, loading; writes nothing."""
