"""The fine-tuning trainer against the model's own loss, and its way through accumulation and evaluation."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from data_scripts.train_tokenizer import train_tokenizer
from recipes.callbacks import ExpertBalanceCallback
from recipes.sft_config import SFTRecipeConfig
from recipes.sft_trainer import RecipeSFTTrainer
from tests.recipes.tiny_run import SIZES

VOCABULARY = 320


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words"], VOCABULARY)


def examples(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, 20, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return Dataset.from_list(rows)


def build(tmp_path, tokenizer, model=None, callbacks=(), **changes):
    settings = {
        "model_name_or_path": "in memory", "dataset_name": "in memory", "output_dir": str(tmp_path), "use_cpu": True,
        "max_length": 40, "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": 1e-2, "packing": False, "report_to": "none", "disable_tqdm": True, "device_peak_tflops": 0.1,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    args = SFTRecipeConfig(**(settings | changes))
    if model is None:
        set_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_r1"](**(SIZES | {"vocab_size": VOCABULARY})))
    return RecipeSFTTrainer(
        model=model, args=args, train_dataset=examples(), eval_dataset=examples(7, seed=1), processing_class=tokenizer,
        callbacks=list(callbacks),
    )  # fmt: skip


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_the_models_own(tmp_path, tokenizer, packing, smoothing):
    """MTP and label smoothing included, padded and packed, with their gradients."""
    trainer = build(tmp_path, tokenizer, packing=packing, label_smoothing_factor=smoothing)
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("position_ids" in batch) == packing
    items = torch.tensor(50)
    ours = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    our_gradients = gradients(model, ours)
    inputs = {name: batch[name] for name in batch if name != "use_cache"}
    output = model(**inputs, num_items_in_batch=items)
    assert model.config.label_smoothing == smoothing and output.mtp_loss > 0
    torch.testing.assert_close(ours, output.loss, rtol=1e-5, atol=1e-6)
    expected = gradients(model, output.loss)
    assert our_gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_packed_rows_are_their_examples(tmp_path, tokenizer):
    """The same loss and expert counts as each example alone; the filling counts nowhere."""
    changes = {"packing": True, "per_device_train_batch_size": 2}
    trainer = build(tmp_path, tokenizer, callbacks=[ExpertBalanceCallback()], **changes)
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 2 and not batch["token_mask"].all()
    packed = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(100))
    packed.backward()
    loads = {i: router.load_counts.clone() for i, router in model.routers.items()}
    model.discard_expert_counts()
    total, tokens = 0.0, 0
    for ids, labels, positions, real in zip(*(batch[n] for n in ("input_ids", "labels", "position_ids", "token_mask"))):
        starts = [i for i in range(int(real.sum())) if positions[i] == 0] + [int(real.sum())]
        for begin, end in zip(starts, starts[1:]):
            alone = {"input_ids": ids[None, begin:end], "labels": labels[None, begin:end]}
            loss = model(**alone, num_items_in_batch=torch.tensor(100)).loss
            loss.backward()
            total, tokens = total + loss.detach(), tokens + end - begin
    torch.testing.assert_close(packed.detach(), total, rtol=1e-5, atol=1e-6)
    assert tokens == trainer.count_tokens(batch) == batch["token_mask"].sum()
    for layer, load in loads.items():
        assert torch.equal(load, model.routers[layer].load_counts)
    assert loads[1].sum() == tokens * model.config.num_experts_per_tok


def test_a_frozen_mtp_layer_takes_no_part(tmp_path, tokenizer):
    trainer = build(tmp_path, tokenizer)
    trainer.model.freeze_mtp()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    assert not any("layers.2." in name for name in gradients(trainer.model, loss))
    assert trainer._mtp_loss is None


@pytest.mark.parametrize("rows, accumulation", [(8, 1), (2, 4), (1, 8)])
def test_the_step_does_not_depend_on_its_micro_batches(tmp_path, tokenizer, rows, accumulation):
    """The same weights after a step, and the same logged losses: one denominator for next-token loss and MTP."""
    changes = {"label_smoothing_factor": 0.1, "optim": "sgd", "weight_decay": 0.0, "max_steps": 1}
    trainer = build(
        tmp_path, tokenizer, callbacks=[ExpertBalanceCallback()], per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation, **changes,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    first = trainer.train_dataset.select(range(8))
    length = max(map(len, first["input_ids"]))
    pad = lambda values, fill: torch.tensor([v + [fill] * (length - len(v)) for v in values])  # noqa: E731
    labels = pad(first["labels"], -100)
    mask = pad([[1] * len(ids) for ids in first["input_ids"]], 0)
    items = (labels != -100).sum()
    output = trainer.model.train()(
        input_ids=pad(first["input_ids"], 0), attention_mask=mask, labels=labels, num_items_in_batch=items
    )
    expected = gradients(trainer.model, output.loss)
    trainer.model.zero_grad(set_to_none=True)
    trainer.model.discard_expert_counts()
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    assert logged["mtp_loss"] == pytest.approx(output.mtp_loss.item(), rel=1e-4)
    for name, parameter in trainer.model.named_parameters():
        change = (before[name] - parameter.detach()) / 1e-2
        torch.testing.assert_close(change, expected[name], rtol=1e-2, atol=2e-5, msg=name)


def test_held_out_loss_is_the_mean_over_tokens(tmp_path, tokenizer):
    values = []
    for size, packing in ((1, {}), (3, {"packing": True}), (7, {"packing": True, "eval_packing": False})):
        changes = packing | {"per_device_eval_batch_size": size, "label_smoothing_factor": 0.1}
        trainer = build(tmp_path, tokenizer, **changes)
        values.append(trainer.evaluate())
    nats = tokens = right = 0
    for row in examples(7, seed=1):
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        nats += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        tokens += (labels != -100).sum().item()
    for found in values:
        assert found["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert found["eval_token_accuracy"] == pytest.approx(right / tokens) and found["eval_tokens"] == tokens


def test_noise_on_embeddings_in_training_only(tmp_path, tokenizer):
    """NEFTune (arXiv:2310.05914): other losses in training, none afterwards."""
    losses = []
    for alpha in (None, 5.0):
        trainer = build(tmp_path / str(alpha), tokenizer, neftune_noise_alpha=alpha, learning_rate=1e-9)
        trainer.train()
        losses.append((trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]))
    assert abs(losses[0][0] - losses[1][0]) > 1e-4
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-6)


def test_other_models_train_too(tmp_path, tokenizer):
    """A dense model of the library, with TRL's own label smoothing."""
    set_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    trainer = build(tmp_path, tokenizer, LlamaForCausalLM(config), label_smoothing_factor=0.1, max_steps=12)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < 0.95 * losses[0] and trainer.args.label_smoothing_factor == 0.1
    assert "mfu" not in trainer.state.log_history[-2] and trainer.label_smoother is not None


def test_packed_rows_of_other_models(tmp_path, tokenizer):
    """Learned positions up to max_length and not beyond; the filling is counted nowhere."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(n_positions=40, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)
    trainer = build(tmp_path, tokenizer, GPT2LMHeadModel(config), packing=True)
    batch = next(iter(trainer.get_train_dataloader()))
    rows = trainer.train_dataset.select(range(4))["input_ids"]
    assert trainer.count_tokens(batch) == sum(map(len, rows)) < batch["input_ids"].numel()
    assert "token_mask" in batch and "token_mask" not in trainer._prepare_inputs(dict(batch))
    trainer.train()
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="in a bloom model the examples of a row see each other"):
        build(tmp_path, tokenizer, model, packing=True)  # it finds positions by the attention mask alone


def test_what_a_trainer_refuses(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="loss_type=dft has no multi-token-prediction loss; set mtp_loss_coef=0"):
        build(tmp_path, tokenizer, loss_type="dft")
    with pytest.raises(ValueError, match="12 rows of examples fill no batch: .* is 13; lower it"):
        build(tmp_path, tokenizer, per_device_train_batch_size=13)
    build(tmp_path, tokenizer, per_device_train_batch_size=13, dataloader_drop_last=False).train()


@pytest.mark.parametrize("field, value, reason", [
    ("chat_template_path", "a.jinja", "no effect here; leave it out and use chat_template"),
    ("completion_only_loss", True, "use assistant_only_loss"), ("padding_free", True, "needs packing=true"),
    ("eval_packing", True, "needs packing=true"), ("fp16", True, "fp16=true needs a GPU"),
    ("multi_turn", "all", "must be one of split, last, keep"), ("overlong", "cut", "must be one of shorten"),
    ("weights_dtype", "float16", "must be float32 or bfloat16"), ("max_length", None, "at least 8"),
    ("lora_groups", ["atention"], "known groups are attention"), ("load_in_4bit", True, "set lora_rank"),
    ("eval_samples", 4, "eval_temperature"), ("mtp_loss_coef", -1.0, "zero or more"),
    ("dataset_name", None, "dataset_name is unset"), ("eval_tasks", ["nope"], "unknown task 'nope'"),
])  # fmt: skip
def test_settings_that_cannot_work(tmp_path, field, value, reason):
    fields = {"model_name_or_path": "a", "dataset_name": "b", "output_dir": str(tmp_path), "use_cpu": True}
    fields |= {"packing": "packing" not in field and field != "padding_free"}
    with pytest.raises(ValueError, match=reason):
        SFTRecipeConfig(**(fields | {field: value}))


def test_quantised_bases_need_a_gpu_and_adapters(tmp_path):
    fields = {"model_name_or_path": "a", "dataset_name": "b", "output_dir": str(tmp_path), "load_in_4bit": True}
    with pytest.raises(ValueError, match="needs a CUDA device"):
        SFTRecipeConfig(**fields, use_cpu=True, lora_rank=4)
    with pytest.raises(ValueError, match="exclude each other"):
        SFTRecipeConfig(**fields, use_cpu=True, lora_rank=4, load_in_8bit=True)
