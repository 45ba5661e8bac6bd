"""A toy Bark for tests: a real `BarkModel`, small, with seeded random weights. It babbles noise.

    python tests/fakes/toy_model.py DIR [--seed N] [--greedy] [--eos soon|late|never|first]

DIR gets the file layout of suno/bark on the Hugging Face hub: config.json, generation_config.json,
pytorch_model.bin (a plain pickle in the old key layout), the tokenizer, and 130 voices with
speaker_embeddings_path.json. Ids, windows and sampling are Suno's own; only the widths are small.

Random weights alone never emit the end token, so a few are set by hand. Three of the semantic
model's 32 hidden channels are a clock, a weight and a length:

- the clock of the position embedding rises with every generated token;
- the weight of the token embedding is positive for text tokens, zero for padding and random for
  semantic tokens. One head of layer 0 attends to all positions alike and writes the mean weight
  into the length channel: it grows with the text and differs from voice to voice;
- the end token's logit is proportional to clock minus length, which no other token reads.

So every generation ends, greedy or sampled, later for longer texts and elsewhere for each voice.
`eos` moves the clock: "soon" gives about 12 to 155 semantic tokens (0.2 to 3 s) for texts of up to
80 characters, "late" about 340 to 460 (more than 512 frames, so more than one fine window with the
voices that fill the fine history), "never" runs to max_new_tokens and "first" ends at once, an
empty generation.

Ids that a correct sampler must refuse are made loud, so that one which forgets them sounds
different: semantic 10001..10047, coarse 12048..12095, fine 1024..1055.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BarkConfig, BarkModel

# Suno's numbers (suno-ai/bark, bark/generation.py), as in the hub's config and generation_config.
SEMANTIC_VOCAB = 10_000
SEMANTIC_PAD = 10_000  # also the end token
TEXT_OFFSET = 10_048
TEXT_PAD = 129_595
SEMANTIC_INFER = 129_599
COARSE_END = SEMANTIC_VOCAB + 2 * 1024
CODEBOOK_SIZE = 1024
PROMPT_LEN = 257  # 256 summed text and history slots, then the infer token
SEMANTIC_HZ, FRAME_HZ = 49.9, 75

HIDDEN, HEADS, LAYERS = 32, 2, 2
CLOCK, WEIGHT, LENGTH = 0, 1, 2  # hidden channels of the semantic model, see above

# Clock reading at the first generated token. One further token adds CLOCK_STEP.
CLOCK_STEP = 0.0085
CLOCK_START = {"soon": 0.6, "late": -2.2, "never": -30.0, "first": 30.0}

LANGUAGES = ("de", "en", "es", "fr", "hi", "it", "ja", "ko", "pl", "pt", "ru", "tr", "zh")
VOICES = tuple(f"v2/{lang}_speaker_{i}" for lang in LANGUAGES for i in range(10))

# Unicode blocks whose characters continue a word (hence also "##x"), and CJK ideographs, which
# BERT always takes one by one. Emoji are not there: [UNK], as in bert-base-multilingual-cased.
WORD_BLOCKS = (
    (0x21, 0x7E), (0xA1, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x58A),
    (0x591, 0x5F4), (0x60C, 0x6FF), (0x900, 0x97F), (0xE01, 0xE5B), (0x10D0, 0x10FF),
    (0x1E00, 0x1EFF), (0x2010, 0x2027), (0x2030, 0x205E), (0x20A0, 0x20BF), (0x2669, 0x266F),
    (0x3001, 0x3020), (0x3041, 0x30FF), (0xAC00, 0xD7A3), (0xFF01, 0xFF9F),
)  # fmt: skip
IDEOGRAPHS = (0x4E00, 0x9FFF)


def build(directory: Path, seed: int = 0, greedy: bool = False, eos: str = "soon") -> None:
    """Write the toy model into `directory` (made if missing), about 30 MB.

    `greedy` writes do_sample false everywhere and fine temperature 1.0, which is argmax there.
    `eos` is one of "soon", "late", "never", "first". The same arguments give the same files.
    Raises ValueError for another `eos`. The caller's torch random state stays as it was.
    """
    if eos not in CLOCK_START:
        raise ValueError(f"eos is {eos!r}; allowed: {', '.join(CLOCK_START)}")
    directory.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _random_model(CLOCK_START[eos])
    model.config.architectures = ["BarkModel"]
    model.config.save_pretrained(directory)
    torch.save(_hub_layout(model.state_dict()), directory / "pytorch_model.bin")
    _write_json(directory / "generation_config.json", _generation_config(greedy))
    _write_tokenizer(directory)
    _write_voices(directory, np.random.default_rng(seed))


def _model_config() -> BarkConfig:
    """Suno's vocabularies and block size; a codec built like the hub's with few filters."""
    size = {"num_layers": LAYERS, "num_heads": HEADS, "hidden_size": HIDDEN, "bias": False}
    vocab = {"input_vocab_size": 12_096, "output_vocab_size": 12_096}
    return BarkConfig(
        semantic_config={**size, "input_vocab_size": 129_600, "output_vocab_size": 10_048},
        coarse_acoustics_config={**size, **vocab},
        fine_acoustics_config={
            **size, "input_vocab_size": 1056, "output_vocab_size": 1056,
            "n_codes_total": 8, "n_codes_given": 1,
        },
        codec_config={
            "model_type": "encodec", "hidden_size": 16, "codebook_dim": 16, "num_filters": 2,
            "num_lstm_layers": 2, "upsampling_ratios": [8, 5, 4, 2], "sampling_rate": 24_000,
            "use_causal_conv": True, "norm_type": "weight_norm",
            "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0],
        },
    )  # fmt: skip


def _random_model(clock_start: float) -> BarkModel:
    model = BarkModel(_model_config()).eval()
    with torch.no_grad():
        for transformer in (model.semantic, model.coarse_acoustics, model.fine_acoustics):
            _randomise_transformer(transformer)
        _shape_semantic(model.semantic, clock_start)
        model.coarse_acoustics.lm_head.weight[COARSE_END:] *= 1.2
        for embed in model.fine_acoustics.input_embeds_layers:
            embed.weight[CODEBOOK_SIZE:] *= 1.2
        _randomise_codec(model.codec_model)
    return model


def _randomise_transformer(transformer: nn.Module) -> None:
    """Weights far larger than at a training's start, so that every token in the context counts.

    Attention scores have a standard deviation of about 2, logits of about 6: greedy choices are
    clear (the best logit leads by more than 1 on average) and samples still vary.
    """
    std = {"att_proj": 0.25, "attn.out_proj": 0.4, "in_proj": 0.18, "mlp.out_proj": 0.09}
    for name, weight in transformer.named_parameters():
        if "layernorm" in name:
            continue
        nn.init.normal_(weight, std=next((s for part, s in std.items() if part in name), 1.0))


def _shape_semantic(semantic: nn.Module, clock_start: float) -> None:
    """Install clock, weight, length and end token, see the module's docstring."""
    ours = [CLOCK, WEIGHT, LENGTH]
    for block in semantic.layers:
        for projection in (block.attn.out_proj, block.mlp.out_proj):
            projection.weight[ours] = 0
    tokens, positions = semantic.input_embeds_layer.weight, semantic.position_embeds_layer.weight
    tokens[:, [CLOCK, LENGTH]] = 0
    tokens[:SEMANTIC_VOCAB, WEIGHT] *= 1.5
    tokens[TEXT_OFFSET:, WEIGHT] = 2 + 0.5 * tokens[TEXT_OFFSET:, WEIGHT]
    tokens[[SEMANTIC_PAD, TEXT_PAD, SEMANTIC_INFER], WEIGHT] = 0
    positions[:, ours] = 0
    step = torch.arange(len(positions) - PROMPT_LEN + 1)
    positions[PROMPT_LEN - 1 :, CLOCK] = clock_start + CLOCK_STEP * step
    attn = semantic.layers[0].attn
    attn.att_proj.weight[: HIDDEN // HEADS] = 0  # query of head 0: the same for every key
    attn.att_proj.weight[2 * HIDDEN] = torch.eye(HIDDEN)[WEIGHT]  # its first value channel
    attn.out_proj.weight[LENGTH, 0] = 3.5
    logits = semantic.lm_head.weight
    logits[:, ours] = 0
    logits[SEMANTIC_PAD + 1 :] *= 1.2
    logits[SEMANTIC_PAD] = 0
    logits[SEMANTIC_PAD, [CLOCK, LENGTH]] = torch.tensor([50.0, -50.0])


def _randomise_codec(codec: nn.Module) -> None:
    """Codebooks that all count, later ones less, and a decoder that keeps their signal.

    Without biases, which would drown it in a steady buzz; each convolution's gain is set so that
    random codes give a standard deviation of 1, and the last one's for samples of about 0.06.
    """
    for i, layer in enumerate(codec.quantizer.layers):
        embed = layer.codebook.embed
        embed.copy_(torch.randn(embed.shape) * 0.85**i)
        layer.codebook.embed_avg.copy_(embed)
        layer.codebook.cluster_size.fill_(1.0)
    for name, weight in codec.decoder.named_parameters():
        if name.endswith("conv.bias"):
            weight.zero_()
    hidden = codec.quantizer.decode(torch.randint(CODEBOOK_SIZE, (8, 1, 75)))
    for layer in codec.decoder.layers:
        if hasattr(layer, "conv"):
            std = 0.06 if layer is codec.decoder.layers[-1] else 1.0
            gain = layer.conv.parametrizations.weight.original0
            gain *= std / layer(hidden).std()
        hidden = layer(hidden)


def _hub_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Old names of weight norm's gain and direction, as in the hub's pytorch_model.bin."""
    old = {"parametrizations.weight.original0": "weight_g",
           "parametrizations.weight.original1": "weight_v"}  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        for new_part, old_part in old.items():
            name = name.replace(new_part, old_part)
        renamed[name] = tensor
    return renamed


def _generation_config(greedy: bool) -> dict[str, object]:
    """The hub's values (min_eos_p is Suno's default)."""
    sampling = {
        "do_sample": not greedy, "temperature": 0.7, "top_k": 50, "top_p": 1.0, "num_beams": 1,
        "repetition_penalty": 1.0, "renormalize_logits": True, "pad_token_id": None,
        "bos_token_id": None,
    }  # fmt: skip
    return {
        "model_type": "bark",
        "sample_rate": 24_000,
        "codebook_size": CODEBOOK_SIZE,
        "semantic_config": {
            **sampling, "model_type": "semantic", "eos_token_id": SEMANTIC_PAD,
            "max_new_tokens": 768, "text_encoding_offset": TEXT_OFFSET,
            "text_pad_token": TEXT_PAD, "semantic_infer_token": SEMANTIC_INFER,
            "semantic_vocab_size": SEMANTIC_VOCAB, "max_input_semantic_length": 256,
            "semantic_rate_hz": SEMANTIC_HZ, "min_eos_p": 0.2,
        },
        "coarse_acoustics_config": {
            **sampling, "model_type": "coarse_acoustics", "eos_token_id": None,
            "coarse_semantic_pad_token": 12_048, "coarse_infer_token": 12_050,
            "coarse_rate_hz": FRAME_HZ, "n_coarse_codebooks": 2, "max_coarse_input_length": 256,
            "max_coarse_history": 630, "sliding_window_len": 60,
        },
        "fine_acoustics_config": {
            "model_type": "fine_acoustics", "temperature": 1.0 if greedy else 0.5,
            "max_fine_history_length": 512, "max_fine_input_length": 1024, "n_fine_codebooks": 8,
        },
    }  # fmt: skip


def _vocabulary() -> list[str]:
    """Character-level word pieces; the special tokens have bert-base-multilingual-cased's ids."""
    words = [chr(c) for first, last in WORD_BLOCKS for c in range(first, last + 1)]
    special = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100))]
    special += ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ideographs = [chr(c) for c in range(IDEOGRAPHS[0], IDEOGRAPHS[1] + 1)]
    return special + words + [f"##{word}" for word in words] + ideographs


def _write_tokenizer(directory: Path) -> None:
    pieces = _vocabulary()
    (directory / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP")}
    special["mask_token"] = "[MASK]"
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    _write_json(directory / "special_tokens_map.json", special)
    bert = {"do_lower_case": False, "strip_accents": None, "tokenize_chinese_chars": True,
            "model_max_length": 512, "tokenizer_class": "BertTokenizer"}  # fmt: skip
    _write_json(directory / "tokenizer_config.json", {**special, **bert})


def _write_voices(directory: Path, rng: np.random.Generator) -> None:
    """192 to 697 semantic tokens each, 3.84 to 13.96 s: the range of Suno's own v2 prompts."""
    (directory / "speaker_embeddings" / "v2").mkdir(parents=True, exist_ok=True)
    table: dict[str, object] = {"repo_or_path": "suno/bark"}
    for voice in VOICES:
        paths = {f"{kind}_prompt": f"speaker_embeddings/{voice}_{kind}_prompt.npy"
                 for kind in ("semantic", "coarse", "fine")}  # fmt: skip
        for kind, array in _voice_prompt(rng).items():
            np.save(directory / paths[kind], array)
        table[voice] = paths
    _write_json(directory / "speaker_embeddings_path.json", table)


def _voice_prompt(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """semantic int64 (n,), coarse int64 (2, m), fine int32 (8, m); m/n is 75/49.9 Hz."""
    # Squaring favours short prompts: on the hub 112 of 130 exceed 256 tokens, 64 512 frames.
    n_semantic = 192 + int(506 * rng.random() ** 1.5)
    n_frames = math.floor(n_semantic * FRAME_HZ / SEMANTIC_HZ)
    fine = rng.integers(0, CODEBOOK_SIZE, (8, n_frames), dtype=np.int32)
    semantic = rng.integers(0, SEMANTIC_VOCAB, n_semantic, dtype=np.int64)
    return {
        "semantic_prompt": semantic,
        "coarse_prompt": fine[:2].astype(np.int64),
        "fine_prompt": fine,
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the toy Bark that the tests use.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="do_sample false, fine argmax")
    parser.add_argument("--eos", choices=CLOCK_START, default="soon", help="when speech ends")
    args = parser.parse_args()
    build(args.directory, args.seed, args.greedy, args.eos)


if __name__ == "__main__":
    main()
