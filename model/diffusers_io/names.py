"""Parameter names: ours <-> those of diffusers' QwenImageTransformer2DModel. A bijection, tensor for tensor."""

import re

_TOP = {
    "time.linear_1": "time_text_embed.timestep_embedder.linear_1",
    "time.linear_2": "time_text_embed.timestep_embedder.linear_2",
    "output.mod": "norm_out.linear",
    "output.proj": "proj_out",
    "img_in": "img_in",
    "txt_in": "txt_in",
    "txt_norm": "txt_norm",
}
_BLOCK = {
    "img.mod": "img_mod.1",
    "img.q": "attn.to_q",
    "img.k": "attn.to_k",
    "img.v": "attn.to_v",
    "img.q_norm": "attn.norm_q",
    "img.k_norm": "attn.norm_k",
    "img.out": "attn.to_out.0",
    "img.mlp_in": "img_mlp.net.0.proj",
    "img.mlp_out": "img_mlp.net.2",
    "txt.mod": "txt_mod.1",
    "txt.q": "attn.add_q_proj",
    "txt.k": "attn.add_k_proj",
    "txt.v": "attn.add_v_proj",
    "txt.q_norm": "attn.norm_added_q",
    "txt.k_norm": "attn.norm_added_k",
    "txt.out": "attn.to_add_out",
    "txt.mlp_in": "txt_mlp.net.0.proj",
    "txt.mlp_out": "txt_mlp.net.2",
}
_TOP_BACK, _BLOCK_BACK = ({v: k for k, v in table.items()} for table in (_TOP, _BLOCK))


def to_diffusers(module: str) -> str:
    """diffusers' name of our module or parameter (`blocks.3.img.q.weight`). Raises KeyError for an unknown name."""
    return _translate(module, "blocks", "transformer_blocks", _TOP, _BLOCK)


def from_diffusers(module: str) -> str:
    """Our name of diffusers' module or parameter. Raises KeyError for an unknown name."""
    return _translate(module, "transformer_blocks", "blocks", _TOP_BACK, _BLOCK_BACK)


def _translate(name: str, blocks: str, new_blocks: str, top: dict[str, str], block: dict[str, str]) -> str:
    stem, leaf = re.fullmatch(r"(.*?)(\.weight|\.bias|)", name).groups()
    inside = re.fullmatch(rf"{blocks}\.(\d+)\.(.*)", stem)
    if inside:
        return f"{new_blocks}.{inside[1]}.{block[inside[2]]}{leaf}"
    return top[stem] + leaf
