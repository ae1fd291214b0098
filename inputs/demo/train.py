"""Train the demo model: a small Llama on the King James Bible, saved as a Hugging Face directory.

    bible -l100000 Ge1:1-Re22:21 > kjv.txt                    # Debian packages bible-kjv and bible-kjv-text
    python inputs/demo/train.py --text kjv.txt --output inputs/demo/model

Needs torch, transformers and tokenizers. Runs on CUDA if there is a GPU and on the CPU otherwise (slowly).
It knows nothing of Noria.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
VOCABULARY = 2048
CONTEXT = 1024
PASSAGE = 12  # verses
HELD_OUT_EVERY = 20  # one chapter in twenty is never trained on

SAMPLES = ["In the beginning", "And it came to pass", "The LORD is my", "Psalms 151:1\n", "Then answered Peter"]


def read_chapters(path):
    """Return [(heading, verses)] from the output of `bible -l100000 Ge1:1-Re22:21`: 1189 chapters, 31102 verses."""
    if not path.is_file():
        raise SystemExit(
            f"{path}: no such file. Make it with the Debian packages bible-kjv and bible-kjv-text:\n"
            f"    apt-get install bible-kjv && bible -l100000 Ge1:1-Re22:21 > {path}"
        )
    chapters = []
    for line in path.read_text(encoding="ascii").splitlines():
        verse = re.fullmatch(r"\s+(\d+) (.+)", line)
        if verse:
            chapters[-1][1].append(verse[2].strip())
        elif line.strip():
            chapters.append((line.strip(), []))
    num_verses = sum(len(verses) for _, verses in chapters)
    if (len(chapters), num_verses) != (1189, 31102):
        raise SystemExit(f"{path}: {len(chapters)} chapters and {num_verses} verses, expected 1189 and 31102")
    return chapters


def split(chapters):
    """Return the chapters to train on and the held-out ones."""
    held_out = chapters[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    return [chapter for chapter in chapters if chapter not in held_out], held_out


def documents(chapters):
    """Return the documents: passages (`Genesis 1:13`, then a verse a line) and every verse by itself."""
    texts = []
    for heading, verses in chapters:
        for first in range(0, len(verses), PASSAGE):
            texts.append("\n".join([f"{heading}:{first + 1}", *verses[first : first + PASSAGE]]))
        texts.extend(verses)
    return texts


def train_tokenizer(texts):
    """Return a byte-level BPE tokenizer that puts BOS first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode(tokenizer, texts):
    """Return one int64 tensor a document: BOS, its tokens, EOS."""
    return [torch.tensor([*encoding.ids, EOS_ID]) for encoding in tokenizer.encode_batch(texts)]


def windows(encoded, generator):
    """Fill rows of CONTEXT tokens with documents in a random order: a row starts with BOS, its last document is cut."""
    rows, row, length = [], [], 0
    for index in torch.randperm(len(encoded), generator=generator).tolist():
        row.append(encoded[index])
        length += len(encoded[index])
        if length >= CONTEXT:
            rows.append(torch.cat(row)[:CONTEXT])
            row, length = [], 0
    return torch.stack(rows)


def batches(encoded, batch_rows, generator):
    """Yield batches of windows for ever, every epoch in a new order."""
    while True:
        rows = windows(encoded, generator)
        for start in range(0, len(rows) - batch_rows + 1, batch_rows):
            yield rows[start : start + batch_rows]


def build_model(dropout):
    """Return a 12-layer Llama with grouped-query attention and a tied head: 2.8 M parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=416,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)

    # Llama has no residual dropout of its own: add it after the embedding and after both halves of a layer.
    def drop(module, inputs, output):
        return torch.nn.functional.dropout(output, dropout, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)
    return model


def build_optimizer(model, learning_rate, weight_decay):
    """Return AdamW that decays matrices but not norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def loss_of(model, rows):
    """Return the mean cross-entropy (nats a token) of rows (int64, [rows, CONTEXT]) on the model's device."""
    rows = rows.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        return model(input_ids=rows, labels=rows).loss


@torch.no_grad()
def evaluate(model, rows, batch_rows=32):
    """Return the mean loss over all rows, without dropout."""
    model.eval()
    total = sum(loss_of(model, part).item() * len(part) for part in rows.split(batch_rows))
    model.train()
    return total / len(rows)


def train(model, encoded, held_out, options, save):
    """Train with warmup and cosine decay; `save` at every evaluation. Return held-out and as many training rows."""
    generator = torch.Generator().manual_seed(options.seed)
    held_out_rows = windows(held_out, generator)
    feed = batches(encoded, options.batch_rows, generator)
    optimizer = build_optimizer(model, options.learning_rate, options.weight_decay)
    start, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        # The schedule ends at --steps, or at --seconds if the machine is too slow for them.
        progress = max((step + 1) / options.steps, (time.monotonic() - start) / options.seconds)
        warmup = min(1.0, (step + 1) / options.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * warmup * (0.02 + 0.98 * cosine)
        loss = loss_of(model, next(feed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % options.evaluate_every == 0 or progress >= 1:
            held_out_loss = evaluate(model, held_out_rows)
            seconds = time.monotonic() - start
            print(f"step {step} {seconds:.0f} s train {loss.item():.3f} held-out {held_out_loss:.3f}", flush=True)
            save(model)
    return held_out_rows, windows(encoded, generator)[: len(held_out_rows)]


def save_model(model, tokenizer, output):
    """Write the Hugging Face directory in bfloat16."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16).save_pretrained(output)
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID).save_pretrained(output)
    tokenizer.save(str(output / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    settings |= {"model_max_length": CONTEXT, "clean_up_tokenization_spaces": False}
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (output / "model.safetensors").chmod(0o644)


def show_samples(model, tokenizer):
    """Print a greedy continuation of each sample prompt."""
    for prompt in SAMPLES:
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        ended = "EOS" if out[0, -1] == EOS_ID else "length"
        print(f"--- {prompt!r} [{ended}]\n{tokenizer.decode(out[0, ids.shape[1] :].tolist())}", flush=True)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path("kjv.txt"))
    parser.add_argument("--output", type=Path, default=Path("inputs/demo/model"))
    parser.add_argument("--steps", type=int, default=4300)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end the schedule by then")
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1611)
    return parser.parse_args()


def main():
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    training, held_out = split(read_chapters(options.text))
    tokenizer = train_tokenizer(documents(training))
    encoded, held_out = encode(tokenizer, documents(training)), encode(tokenizer, documents(held_out))
    model = build_model(options.dropout).to("cuda" if torch.cuda.is_available() else "cpu").train()
    print(f"{model.num_parameters()} parameters, {sum(map(len, encoded))} training tokens, {model.device}", flush=True)

    held_out_rows, training_rows = train(
        model, encoded, held_out, options, lambda trained: save_model(trained, tokenizer, options.output)
    )
    saved = LlamaForCausalLM.from_pretrained(options.output).to(model.device)
    print(f"saved model: train {evaluate(saved, training_rows):.3f} held-out {evaluate(saved, held_out_rows):.3f}")
    show_samples(saved.eval(), tokenizer)


if __name__ == "__main__":
    main()
