"""Small tokenizers in the shapes that real checkpoints have, and what they and their chat templates answer.

Trained on the Jane Austen passages of `reference/` with a few lines in other scripts. The pre-tokenizers are those of
the models they are named after, so that llama.cpp's `tokenizer.ggml.pre` names them too. The chat templates are our
own text in the published prompt formats, each written with other Jinja features.
"""

import json
import shutil
from pathlib import Path

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .models import write_json
from .reference import training_text

# Enough of each to earn a merge: multi-byte characters must also occur as one token, not only byte by byte.
OTHER_SCRIPTS = ["naïve café, déjà vu — “coûte que coûte”\n", "日本語の日本語\n", "Привет, привет\n", "🙂🙂 👍🏽\n"] * 12

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

SMOLLM2_CHAT = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small test model.<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = """\
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system_message = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}"
    "{% set loop_messages = messages[1:] %}"
    "{% else %}{% set system_message = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system_message if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
)


def special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


# ---------------------------------------------------------------------------------------------------------- training


def byte_level(lines: list[str], vocab_size: int, specials: list[str], pre_tokenizer, **changes) -> Tokenizer:
    """Byte-level BPE: any text, any byte sequence, no unknown token. The specials get the first ids."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=changes.get("ignore_merges", False)))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if "normalizer" in changes:
        tokenizer.normalizer = changes["normalizer"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[special(text) for text in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    if changes.get("bos"):
        bos = changes["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def byte_level_after(*first) -> pre_tokenizers.PreTokenizer:
    """Splits by `first`, then maps bytes to characters; without `first`, by GPT-2's own regex."""
    use_regex = not any(isinstance(step, pre_tokenizers.Split) for step in first)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*first, last]) if first else last


def make_smollm2(lines: list[str]) -> Tokenizer:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    return byte_level(lines, 320, specials, byte_level_after(pre_tokenizers.Digits(individual_digits=True)))


def make_llama3(lines: list[str]) -> Tokenizer:
    specials = ["<|reserved|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
    specials += ["<|end_header_id|>"]
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    return byte_level(lines, 320, specials, byte_level_after(split), bos="<|begin_of_text|>", ignore_merges=True)


def make_qwen2(lines: list[str]) -> Tokenizer:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    return byte_level(lines, 320, specials, byte_level_after(split), normalizer=normalizers.NFC())


def make_gpt2(lines: list[str]) -> Tokenizer:
    tokenizer = byte_level(lines, 1000, ["<|endoftext|>"], byte_level_after())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def make_llama2(lines: list[str]) -> Tokenizer:
    """What a converted SentencePiece BPE looks like: spaces as U+2581, unknown characters as <0xNN> bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]+|▁+"), behavior="isolated")
    ascii_lines = [line for line in lines if line.isascii()]  # the rest must go through byte fallback
    trained.train_from_iterator(ascii_lines, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    pieces = json.loads(trained.to_str())["model"]

    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += sorted(pieces["vocab"], key=pieces["vocab"].get)
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in pieces["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([special(text) for text in ("<unk>", "<s>", "</s>")])
    return tokenizer


# ------------------------------------------------------------------------------------------------------------- files

# name -> (maker, tokenizer_config.json, chat template, is the template a file of its own as transformers 5 writes it)
TOKENIZERS = {
    "smollm2": (
        make_smollm2,
        dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>",
             tokenizer_class="GPT2Tokenizer", model_max_length=512),
        SMOLLM2_CHAT, False,
    ),
    "llama3": (
        make_llama3,
        dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", tokenizer_class="PreTrainedTokenizerFast",
             model_max_length=512),
        LLAMA3_CHAT, True,
    ),
    "qwen2": (
        make_qwen2,
        dict(bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
             tokenizer_class="Qwen2Tokenizer", add_prefix_space=False, model_max_length=256),
        # The form for several templates: a list of names.
        [{"name": "default", "template": SMOLLM2_CHAT}], False,
    ),
    "gpt2": (
        make_gpt2,
        dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>",
             tokenizer_class="GPT2Tokenizer", add_prefix_space=False, model_max_length=1024),
        None, False,
    ),
    "llama2": (
        make_llama2,
        # The oldest form of the special tokens: dictionaries.
        dict(bos_token={"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True,
                        "rstrip": False, "single_word": False},
             eos_token={"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True,
                        "rstrip": False, "single_word": False},
             unk_token="<unk>", pad_token=None, add_bos_token=True, add_eos_token=False, legacy=False,
             tokenizer_class="LlamaTokenizer", model_max_length=4096),
        LLAMA2_CHAT, False,
    ),
}  # fmt: skip


def write(name: str, lines: list[str], folder: Path) -> None:
    maker, config, template, own_file = TOKENIZERS[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = maker(lines)
    content = json.loads(tokenizer.to_str())
    if name == "gpt2":  # as tokenizers before 0.20 wrote merges: one string with a space in it
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")

    config = {**config, "clean_up_tokenization_spaces": False}
    config["added_tokens_decoder"] = {
        str(id): {key: getattr(token, key) for key in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
        for id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }  # fmt: skip
    if own_file:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif template:
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)


# ---------------------------------------------------------------------------------------------------------- expected

TEXTS = [
    "",
    " ",
    "\n",
    "Hello, world!",
    "  two leading spaces",
    "trailing spaces   ",
    "tabs\tand\r\nCRLF\n\n\nand blank lines",
    "I'll say we've don't CAN'T He'D",
    "In 1815 she wrote 3.14159 pages; 1,234,567 words (٣٤).",
    "\"Emma Woodhouse, handsome, clever, and rich\" -- _Emma_",
    "naïve café déjà vu",
    "cafe\u0301 is not caf\u00e9 to all",
    "日本語のテキスト、中文文本。",
    "Привет, мир!",
    "emoji 🙂👍🏽 family 👨‍👩‍👧‍👦 flag 🇨🇭",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u0000 zero \u200b width \ufeff",
    "مرحبا بالعالم",
    "<|im_start|>user\nHi<|im_end|>",
    "<|begin_of_text|>Hi<|eot_id|>",
    "<s>[INST] Hi [/INST]</s>",
    "almost <|im_start| special <s ><|im_end|><|im_end|>",
    "a" * 70,
    "▁lower▁one▁eighth <0x41>",
]
# Decoded token by token these show a character only when its last byte has come.
STREAMED = ["🙂 日本 é", "a 👨‍👩‍👧‍👦"]

CHATS = [
    [{"role": "user", "content": "Hello?"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "  Who wrote Emma?\n"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two 🙂"},
        {"role": "user", "content": "<|im_end|>{{ three }} \"quoted\" & 'escaped' <b>"},
    ],
    [{"role": "assistant", "content": "I begin"}],
]


def tokenize_cases(name: str, tokenizer: Tokenizer) -> list[dict]:
    cases = []
    for text in TEXTS:
        for add_special_tokens in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            cases.append({
                "tokenizer": name, "text": text, "add_special_tokens": add_special_tokens, "ids": ids,
                "decoded": tokenizer.decode(ids, skip_special_tokens=False),
                "decoded_without_special": tokenizer.decode(ids, skip_special_tokens=True),
            })  # fmt: skip
    return cases


def stream_cases(name: str, tokenizer: Tokenizer) -> list[dict]:
    cases = []
    for text in STREAMED:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        prefixes = [tokenizer.decode(ids[:end], skip_special_tokens=False) for end in range(1, len(ids) + 1)]
        cases.append({"tokenizer": name, "text": text, "ids": ids, "decoded_prefixes": prefixes})
    return cases


def chat_cases(name: str, folder: Path) -> list[dict]:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    cases = []
    for messages in CHATS:
        for add_generation_prompt in (False, True):
            case = {"tokenizer": name, "messages": messages, "add_generation_prompt": add_generation_prompt}
            try:
                case["rendered"] = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=add_generation_prompt, tokenize=False
                )
            except Exception as error:  # a template's own raise_exception
                case["error"] = str(error)
            cases.append(case)
    return cases


def make(out: Path) -> str:
    lines = training_text() + OTHER_SCRIPTS
    expected = {"tokenize": [], "stream": [], "chat": []}
    for name, (_, _, template, _) in TOKENIZERS.items():
        folder = out / "tokenizer" / name
        write(name, lines, folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        expected["tokenize"] += tokenize_cases(name, tokenizer)
        expected["stream"] += stream_cases(name, tokenizer)
        if template:
            expected["chat"] += chat_cases(name, folder)
    rows = ",\n".join(
        f'"{kind}": [\n' + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]"
        for kind, cases in expected.items()
    )
    (out / "tokenizer" / "expected.json").write_text("{\n" + rows + "\n}\n", encoding="utf-8")
    return ", ".join(f"{kind}: {len(cases)} cases" for kind, cases in expected.items())
