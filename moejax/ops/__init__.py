"""Pure functions on arrays: no Flax, no configuration objects, no mesh construction.

Letters in shapes, one meaning everywhere:
B batch, T query time, S key time, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
E experts, A experts per token, M rows (B*T), V vocabulary, L layers, W window (keys seen, itself included).

Weights are output-major ([out, in], as PyTorch stores them), so that y = x Wᵀ.
"""
