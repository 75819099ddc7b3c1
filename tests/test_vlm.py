"""Other people's vision-language models: split, exported, the same greedy tokens as their torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import picture
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor

from tinyalign.export.cli import main
from tinyalign.export.model_dir import write_components, write_manifest
from tinyalign.export.precisions import FLOATS
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.errors import InputError
from tinyalign.runtime.images import load_for, preprocess
from tinyalign.runtime.prompt import TokenSegment, build_prompt
from tinyalign.training.answer import answer
from tinyalign.training.base import without_memory
from tinyalign.training.models.vlm import load_vlm

SPECIAL = (
    "<s>",
    "</s>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
)
ITEMS = (
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ item['text'] }}{% endif %}{% endfor %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ item['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOL_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ message['role'] | capitalize + ':' }}" + ITEMS
    + "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 400, "initializer_range": 0.3,
}  # fmt: skip


def write_tokenizer(place: Path, template: str, bos: bool) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in SPECIAL]
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    whole.save_pretrained(place)
    return whole


def save(model: PreTrainedModel, place: Path) -> None:
    for name, value in model.named_parameters():
        if value.ndim > 1 and ("projector" in name or "connector" in name):
            value.data *= 8  # so that answers depend on the picture
    model.eval().save_pretrained(place)


def write_llava(place: Path) -> None:
    whole = write_tokenizer(place, LLAVA_TEMPLATE, bos=True)
    torch.manual_seed(1)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", "vocab_size": len(whole), **TEXT},
        image_token_index=whole.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = whole.eos_token_id
    save(model, place)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(place)


def write_smol(place: Path, kind: type, config_kind: type) -> None:
    whole = write_tokenizer(place, SMOL_TEMPLATE, bos=False)
    torch.manual_seed(2)
    config = config_kind(
        vision_config=VISION,
        text_config={"model_type": "llama", "vocab_size": len(whole), **TEXT},
        image_token_id=whole.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    config.text_config.pad_token_id = 0
    save(kind(config), place)
    Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    ).save_pretrained(place)
    (place / "generation_config.json").write_text(
        json.dumps({"eos_token_id": whole.convert_tokens_to_ids("<end_of_utterance>")})
    )


WRITE: dict[str, tuple[Callable[[Path], None], type]] = {
    "llava": (write_llava, LlavaForConditionalGeneration),
    "idefics3": (
        lambda place: write_smol(place, Idefics3ForConditionalGeneration, Idefics3Config),
        Idefics3ForConditionalGeneration,
    ),
    "smolvlm": (
        lambda place: write_smol(place, SmolVLMForConditionalGeneration, SmolVLMConfig),
        SmolVLMForConditionalGeneration,
    ),
}


@pytest.mark.parametrize("family", WRITE)
def test_the_same_greedy_tokens_as_the_torch_original(family: str, tmp_path: Path) -> None:
    write, kind = WRITE[family]
    source, target = tmp_path / "source", tmp_path / "target"
    write(source)
    target.mkdir()
    vlm = load_vlm(source)
    parts = without_memory(vlm)
    write_components(parts, target, FLOATS, [picture(0), picture(1)], lambda _: None)
    write_manifest(parts, target, FLOATS, {})
    original = kind.from_pretrained(source).eval()
    table = original.get_input_embeddings().weight  # as the model directory holds it
    table.data = table.data.half().float()
    image = original.config.image_token_id
    answers = set()
    with TinyAlign.load(target, threads=1) as model:
        assert model.banks == ()
        for seed, question in ((0, "What is this?"), (1, "what colour"), (2, "Häuser & ünder")):
            segments = build_prompt(vlm.prompt, vlm.tokenizer, question)
            ids: list[int] = []
            for part in segments:
                ids += part.ids if isinstance(part, TokenSegment) else [image] * vlm.tokens
            pixels = torch.from_numpy(
                preprocess(load_for(picture(seed), vlm.encoder.image), vlm.encoder.image)
            )[None]
            pixels = pixels if family == "llava" else pixels[None]
            with torch.inference_mode():
                expected = original.generate(
                    input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                    pixel_values=pixels, do_sample=False, max_new_tokens=32, eos_token_id=[],
                    pad_token_id=0,
                )[0, len(ids) :].tolist()  # fmt: skip
            told = model.ask(picture(seed), question, max_tokens=32)
            found = list(told.token_ids)
            assert found == expected[: len(found)]
            assert len(found) == 32 or told.finish_reason == "stop"
            assert told.token_ids == answer(parts, [], picture(seed), question, 32).ids
            answers.add(tuple(found))
        with pytest.raises(InputError, match="has no memory"):
            model.memory(picture(0), "This is it.")
        with pytest.raises(InputError, match="has no memory"):
            TinyAlign.load(target, banks=[tmp_path / "bank.sqlite"])
    assert len(answers) == 3
    assert vlm.model_type == family


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llava(tmp_path / "llava")
    fp32 = [f"--{part}-precision=fp32" for part in ("lm", "vision", "connector")]
    arguments = ["--from", str(tmp_path / "llava"), "--out", str(tmp_path / "out"), "--json"]
    assert main([*arguments, *fp32]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answers"]["equal"] == told["answers"]["prompts"] > 0
    with TinyAlign.load(tmp_path / "out", threads=1) as model:
        assert model.ask(picture(3), "What is this?", max_tokens=4).tokens
    report = tmp_path / "report"
    assert main([*arguments, *fp32, "--minimal", "--report", str(report)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {c["component"] for c in told["components"]} >= {"vision", "connector"}
    tried = {(t["component"], t["precision"]) for t in told["report"]["trials"]}
    assert {("vision", "fp16"), ("connector", "int8"), ("lm", "int8")} <= tried
    assert not any("compressor" in component for component, _ in tried)
    with TinyAlign.load(tmp_path / "out", threads=1) as model:
        assert model.parts.manifest.file("lm.ort").bytes > 0
        assert model.ask(picture(3), "What is this?", max_tokens=4).tokens
    (tmp_path / "llava" / "config.json").unlink()
    assert main(arguments) == 2 and "no config.json" in capsys.readouterr().err


def test_prompts_are_those_of_the_chat_template(tmp_path: Path) -> None:
    write_llava(tmp_path / "llava")
    prompt = load_vlm(tmp_path / "llava").prompt
    assert prompt.system == "<s>USER: " and prompt.image == (16,)
    assert prompt.question == "\n{question} ASSISTANT:" and prompt.stop == ("</s>",)


def change(place: Path, name: str, **values: object) -> None:
    config = json.loads((place / name).read_text())
    (place / name).write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("config.json", {"model_type": "paligemma"}, "supported are llava"),
        ("config.json", {"vision_feature_layer": [-2]}, "several layers"),
        ("config.json", {"vision_feature_layer": -9}, "no layer -9"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "only the patches"),
        ("preprocessor_config.json", {"crop_size": 24}, "24 pixels wide"),
    ],
)
def test_what_cannot_be_split_is_refused(
    file: str, values: dict[str, object], said: str, tmp_path: Path
) -> None:
    write_llava(tmp_path)
    change(tmp_path, file, **values)
    with pytest.raises(InputError, match=said) as error:
        load_vlm(tmp_path)
    assert "\n" not in str(error.value)


def test_a_template_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    write_llava(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LLAVA_TEMPLATE.replace("<image>", ""))
    with pytest.raises(InputError, match="picture and a question once"):
        load_vlm(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        load_vlm(tmp_path)


# ---- nanoVLM ------------------------------------------------------------------------------------

NANO = {
    "vit_hidden_dim": 32, "vit_inter_dim": 48, "vit_patch_size": 8, "vit_img_size": 32,
    "vit_n_heads": 2, "vit_n_blocks": 2, "vit_ln_eps": 1e-6, "lm_hidden_dim": 64,
    "lm_inter_dim": 96, "lm_rms_eps": 1e-5, "lm_re_base": 50000, "lm_max_position_embeddings": 400,
    "lm_n_heads": 4, "lm_n_kv_heads": 2, "lm_n_blocks": 2, "mp_pixel_shuffle_factor": 2,
    "mp_image_token_length": 4, "lm_tie_weights": True, "lm_tokenizer": "some/tokenizer",
    "vlm_extra_tokens": {"image_token": "<image>", "global_image_token": "<global-img>"},
    "lm_chat_template": "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] "
    "+ '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}",
}  # fmt: skip


def write_nano(place: Path) -> dict[str, Tensor]:
    """A checkpoint with random weights under nanoVLM's names; its tensors."""
    whole = write_tokenizer(place, "", bos=False)
    config = NANO | {"lm_vocab_size": len(whole)}
    (place / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    c = SimpleNamespace(**config)
    v, d, hd = c.vit_hidden_dim, c.lm_hidden_dim, c.lm_hidden_dim // c.lm_n_heads
    shapes = {
        "vision_encoder.patch_embedding.conv.weight": (v, 3, 8, 8),
        "vision_encoder.patch_embedding.conv.bias": (v,),
        "vision_encoder.patch_embedding.position_embedding": (1, 16, v),
        "vision_encoder.layer_norm.weight": (v,), "vision_encoder.layer_norm.bias": (v,),
        "MP.proj.weight": (d, 4 * v), "decoder.token_embedding.weight": (len(whole), d),
        "decoder.norm.weight": (d,), "decoder.rotary_embd.inv_freq": (hd // 2,),
    }  # fmt: skip
    for i in range(2):
        for name, shape in {
            "ln1": (v,), "ln2": (v,), "attn.qkv_proj": (3 * v, v), "attn.out_proj": (v, v),
            "mlp.fc1": (48, v), "mlp.fc2": (v, 48),
        }.items():  # fmt: skip
            shapes[f"vision_encoder.blocks.{i}.{name}.weight"] = shape
            shapes[f"vision_encoder.blocks.{i}.{name}.bias"] = shape[:1]
        for name, shape in {
            "norm1": (d,), "norm2": (d,), "attn.q_proj": (d, d), "attn.k_proj": (2 * hd, d),
            "attn.v_proj": (2 * hd, d), "attn.out_proj": (d, d), "mlp.gate_proj": (96, d),
            "mlp.up_proj": (96, d), "mlp.down_proj": (d, 96),
        }.items():  # fmt: skip
            shapes[f"decoder.blocks.{i}.{name}.weight"] = shape
    tensors = {name: 0.25 * torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {
        name: 1 + value for name, value in tensors.items() if "norm" in name or ".ln" in name
    }
    tensors["decoder.token_embedding.weight"] = (
        tensors["decoder.token_embedding.weight"].half().float()
    )
    save_file(tensors, place / "model.safetensors")
    return tensors


def nano_tokens(w: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Image tokens [T, D] as nanoVLM computes them from pixels [3, S, S]."""
    w = {name.removeprefix("vision_encoder."): value for name, value in w.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    conv = "patch_embedding.conv"
    x = F.conv2d(pixels[None], w[f"{conv}.weight"], w[f"{conv}.bias"], stride=8)[0].flatten(1).T
    x = x + w["patch_embedding.position_embedding"][0]  # [P, Dv]
    for i in range(2):
        qkv = linear(norm(x, f"blocks.{i}.ln1"), f"blocks.{i}.attn.qkv_proj")
        q, k, v = (t.unflatten(1, (2, 16)).transpose(0, 1) for t in qkv.split(32, 1))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        x = x + linear(seen, f"blocks.{i}.attn.out_proj")
        wide = F.gelu(linear(norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.mlp.fc1"), approximate="tanh")
        x = x + linear(wide, f"blocks.{i}.mlp.fc2")
    grid = norm(x, "layer_norm").unflatten(0, (4, 4))  # [4, 4, Dv]
    squares = [grid[a : a + 2, b : b + 2].reshape(-1) for a in (0, 2) for b in (0, 2)]
    return torch.stack(squares) @ w["MP.proj.weight"].T


def nano_logits(w: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Logits [V] after rows [N, D] as nanoVLM computes them."""
    w = {name.removeprefix("decoder."): value for name, value in w.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w[f"{name}.weight"]

    turns = torch.arange(len(rows))[:, None] / 50000 ** (torch.arange(0, 16, 2) / 16)
    cos, sin = (f(torch.cat([turns, turns], 1)) for f in (torch.cos, torch.sin))  # [N, hd]

    def turned(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin

    x = rows
    for i in range(2):
        block, y = f"blocks.{i}", norm(x, f"blocks.{i}.norm1")
        q, k, v = (
            (y @ w[f"{block}.attn.{t}_proj.weight"].T).unflatten(1, (-1, 16)).transpose(0, 1)
            for t in "qkv"
        )
        k, v = turned(k).repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        seen = F.scaled_dot_product_attention(turned(q), k, v, is_causal=True)
        x = x + seen.transpose(0, 1).flatten(1) @ w[f"{block}.attn.out_proj.weight"].T
        y = norm(x, f"{block}.norm2")
        gate, up = (y @ w[f"{block}.mlp.{t}_proj.weight"].T for t in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{block}.mlp.down_proj.weight"].T
    return norm(x[-1], "norm") @ w["token_embedding.weight"].T


def test_nanovlm_gives_the_tokens_that_its_own_arithmetic_gives(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    tensors = write_nano(source)
    vlm = load_vlm(source)
    assert vlm.prompt.system == "<s>user\n<global-img>" and vlm.prompt.image == (4,)
    parts = without_memory(vlm)
    write_components(parts, target, FLOATS, [picture(0), picture(1)], lambda _: None)
    write_manifest(parts, target, FLOATS, {})
    table = tensors["decoder.token_embedding.weight"]
    with TinyAlign.load(target, threads=1) as model:
        for seed, question in ((0, "What is this?"), (1, "why")):
            pixels = torch.from_numpy(
                preprocess(load_for(picture(seed), vlm.encoder.image), vlm.encoder.image)
            )
            segments = build_prompt(vlm.prompt, vlm.tokenizer, question)
            rows = torch.cat([
                table[list(s.ids)] if isinstance(s, TokenSegment) else nano_tokens(tensors, pixels)
                for s in segments
            ])  # fmt: skip
            told = model.ask(picture(seed), question, max_tokens=32)
            for token in told.token_ids:
                assert int(nano_logits(tensors, rows).argmax()) == token
                rows = torch.cat([rows, table[[token]]])
            assert len(told.token_ids) > 5


def test_nanovlm_that_cannot_be_read(tmp_path: Path) -> None:
    write_nano(tmp_path)
    for values, said in (
        ({"vit_cls_flag": True}, "class token only"),
        ({"mp_image_token_length": 9}, "contradicts itself"),
        ({"lm_re_base": None}, "no lm_re_base"),
        ({"lm_n_blocks": 3}, "does not fit its config.json"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(
            NANO | {"vit_cls_flag": False, "lm_vocab_size": 262} | values
        ))  # fmt: skip
        with pytest.raises(InputError, match=said):
            load_vlm(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(NANO | {"lm_vocab_size": 262}))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="put that of some/tokenizer there"):
        load_vlm(tmp_path)
