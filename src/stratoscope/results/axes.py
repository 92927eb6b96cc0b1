"""The axis words: every dimension of every result has one of these names, and each means one thing."""

from __future__ import annotations

AXES: dict[str, str] = {
    "example": "one prompt, image or pair of the input",
    "layer": "a transformer layer, 0 to n_layers - 1",
    "depth": "number of layers passed, 0 to n_layers; 0 is what enters layer 0",
    "position": "a token of the unpadded prompt, 0 is its first",
    "query": "the position that attends",
    "key": "the position that is attended to",
    "head": "a query head of one layer",
    "kv_head": "a key/value head of one layer, shared by several query heads under grouped-query attention",
    "neuron": "a hidden unit of one layer's MLP",
    "dim": "a coordinate of the residual stream",
    "head_dim": "a coordinate inside one head",
    "vocab": "a token id of the vocabulary",
    "edge": "a link from one component to an input of a later one, with coordinates sender and receiver",
    "component": "a named writer to the residual stream: embedding, head, MLP or bias",
    "rank": "a place in a sorted list, 0 is best",
    "role": "a named behaviour of a head, such as induction",
    "unit": "an entry of a list of neurons, with coordinates layer and neuron",
    "step": "a step of generation, training or integration",
    "expert": "an expert of a mixture-of-experts layer",
    "draw": "one of several random draws",
    "transition": "from the kind of one token to the kind of the next, such as function->content",
}
