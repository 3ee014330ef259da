"""Decoders whose layers attend to image features through cross-attention: what is traced.

Keys of images (*vision keys*) are no tokens: text never moves, and a cut narrows the keys. The
graph has these inputs beside those of every decoder (``vision_index`` and ``token_groups`` it has
not):

- ``cross_states`` [B,V,D]: projected features of this call's images; V is 0 in decode steps and
  without images. A row with fewer begins with zeros.
- ``cross_mask`` [B,S,V] bool: which of them a token sees.
- ``cross_rows`` [B,S] int64, where a family asks: rows that the rest of a cross layer counts in
  (Mllama: its MLP is silent in rows that see no image).
- ``past_key_values.N.key|value`` [B,kv_heads,P,d] of a cross layer N: vision keys of earlier calls.
  The cache begins with one key of zeros (P = 1, dimension ``cross_past``), which only those rows
  see that see no other: what they add is nothing, and no attention is ever over no key at all.
- ``past_mask.cross`` [B,P] int64: which of those keys later rows see; ``present_mask.cross`` goes
  on from it. Behind cut J they are ``past_mask.J`` and ``present_mask.J``.

A cross layer is ``Attention(query, Concat(past, project(cross_states)), …, mask)`` with
``mask = vtr.VtrCrossMask(past_mask, cross_mask)``; the analysis labels the axis of vision keys
(``Axes.vision``, with the past ``Axes.vision_key``) beside that of tokens. ``kept.J`` [B,k] are
columns of ``cross_states`` of the stage before cut J. It is scored by the last row in the last
cross layer before it, and later cross layers project what is left.

``ModelFacts.crosses`` names the layers. A family is a function here: its decoder's own forward,
given a ``Crossing`` of stand-ins, which ``passes/attach_cross.py`` replaces.
"""
