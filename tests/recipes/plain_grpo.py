"""Steps of R1GRPOTrainer recorded as they happen, and the losses of the papers written plainly from the logits."""

import torch
from transformers import TrainerCallback

from modeling_deepseek_r1.replay import recorded_routes
from tests.recipes.tiny_grpo import build
from tests.recipes.tiny_ppo import LENGTH, policy, word_tokenizer

PLAIN = {"router_replay": False, "route_probe_rows": 0, "optim": "sgd", "max_grad_norm": 0.0}


def mean_number(completions, **_):
    """Differs between nearly all completions."""
    return [value_of(completion) for completion in completions]


def value_of(completion):
    return sum(int(word[1:]) for word in completion.split()) / (29 * LENGTH)


class Recorder(TrainerCallback):
    """Keeps of every optimizer step: weights before it, gradients, micro-batches; and the weights of each rollout."""

    def __init__(self):
        self.steps, self.parts, self.sampled, self.rollouts = [], [], None, 0

    def watch(self, trainer):
        self.trainer, loss, generate = trainer, trainer._compute_loss, trainer._generate

        def kept(model, inputs):
            self.parts.append({name: value.clone() for name, value in inputs.items() if value is not None})
            return loss(model, inputs)

        def sampled(prompts):
            self.sampled, self.rollouts = self.weights(), self.rollouts + 1
            return generate(prompts)

        trainer._compute_loss, trainer._generate = kept, sampled
        trainer.add_callback(self)

    def weights(self):
        return {name: tensor.detach().clone() for name, tensor in self.trainer.model.state_dict().items()}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append({"weights": self.weights(), "grads": grads, "parts": self.parts, "sampled": self.sampled,
                           "rollout": self.rollouts})  # fmt: skip
        self.parts = []


def recorded(output_dir, reward=mean_number, **changes):
    """The optimizer steps of a run, by default without the balance loss, which is no part of GRPO's."""
    arguments = {name: changes.pop(name) for name in ("ref_model", "callbacks", "peft_config") if name in changes}
    model = changes.pop("model", None) or policy(seq_aux_loss_alpha=0.0)
    trainer, recorder = build(output_dir, reward, model, arguments=arguments, **(PLAIN | changes)), Recorder()
    recorder.watch(trainer)
    trainer.train()
    return recorder.steps


# ---------------------------------------------------------------- the plain reference


def rows_of(step):
    """[(prompt ids, completion ids)] of an optimizer step, without padding."""
    rows = []
    for part in step["parts"]:
        for row in range(len(part["prompt_ids"])):
            rows.append(tuple(part[f"{name}_ids"][row][part[f"{name}_mask"][row].bool()] for name in
                              ("prompt", "completion")))  # fmt: skip
    return rows


def log_probs_of(model, rows, temperature, routes=None):
    """For each row the (T,) log-probabilities of its completion, one row at a time; `routes`: one record a row."""
    found = []
    for place, (prompt, completion) in enumerate(rows):
        more = {} if routes is None else {"routes": routes[place]}
        logits = model(input_ids=torch.cat([prompt, completion])[None], **more).logits[0, len(prompt) - 1 : -1].float()
        found.append((logits / temperature).log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return found


def load(weights):
    model = policy().eval()  # no balance loss
    model.load_state_dict(weights)
    return model


def advantages_of(steps, scale, reward=value_of):
    """{(prompt, completion) as bytes: advantage} of the steps of one rollout: rewards minus their group's mean."""
    groups, tokenizer, seen = {}, word_tokenizer(), set()
    for step in steps:
        key = step["parts"][0]["completion_ids"].numpy().tobytes()
        if key not in seen:  # a later pass over the same rollout
            seen.add(key)
            for prompt, completion in rows_of(step):
                groups.setdefault(tuple(prompt.tolist()), []).append(completion)
    found = {}
    for prompt, completions in groups.items():
        rewards = torch.tensor([reward(tokenizer.decode(c, skip_special_tokens=True)) for c in completions])
        centred = rewards - rewards.mean()
        if scale == "group":
            centred = centred / (rewards.std() + 1e-4)
        found |= {(prompt, tuple(c.tolist())): a for c, a in zip(completions, centred)}
    return found


def routes_of(model, rows):
    """For each row the (1, S, M, K) experts that the model chooses by itself."""
    with torch.no_grad(), recorded_routes(model) as passes:
        for prompt, completion in rows:
            model(input_ids=torch.cat([prompt, completion])[None])
    return passes


def plain_objective(step, steps, settings, reference=None, reward=value_of, replay=False):
    """(loss, model): what the papers write, over all rows of an optimizer step at once; `replay`: with the experts that
    the weights of the rollout chose."""
    s = {"temperature": 1.0, "epsilon": 0.2, "beta": 0.0, "loss_type": "dapo", "scale_rewards": "group", "delta": None,
         "importance_sampling_level": "token", "use_bias_correction_kl": True} | settings  # fmt: skip
    of_rollout = [each for each in steps if each["rollout"] == step["rollout"]]
    advantages, rows = advantages_of(of_rollout, s["scale_rewards"], reward), rows_of(step)
    model, losses, high = load(step["weights"]), [], s.get("epsilon_high") or s["epsilon"]
    routes = routes_of(load(step["sampled"]), rows) if replay else None
    with torch.no_grad():
        old = log_probs_of(load(step["sampled"]), rows, s["temperature"], routes)
        ref = log_probs_of(reference, rows, s["temperature"]) if s["beta"] else old
    for (prompt, completion), new, before, there in zip(
        rows, log_probs_of(model, rows, s["temperature"], routes), old, ref
    ):
        advantage = advantages[tuple(prompt.tolist()), tuple(completion.tolist())]
        ratio = (new - before).exp()
        if s["importance_sampling_level"] == "sequence":  # GSPO, Eq. 7
            ratio = (new - before).mean().exp().expand(len(new))
        if s["loss_type"] == "cispo":
            losses.append(-ratio.detach().clamp(max=high) * advantage * new)
        else:
            bounded = ratio if s["delta"] is None else ratio.clamp(max=s["delta"])
            losses.append(-torch.min(bounded * advantage, ratio.clamp(1 - s["epsilon"], 1 + high) * advantage))
        if s["beta"]:
            k3 = (there - new).exp() - (there - new) - 1
            losses[-1] = losses[-1] + s["beta"] * k3 * (ratio if s["use_bias_correction_kl"] else 1.0)
    tokens = sum(map(len, losses))
    in_rollout = sum(len(row[1]) for each in of_rollout for row in rows_of(each)) / len(of_rollout)
    if s["loss_type"] == "grpo":
        return sum(each.mean() for each in losses) / len(losses), model
    divisor = {"bnpo": tokens, "dr_grpo": len(rows) * LENGTH}.get(s["loss_type"], in_rollout)
    return sum(each.sum() for each in losses) / divisor, model


def assert_gradient(step, loss, model, tolerance=2e-5):
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() >= step["grads"].keys() and len(step["grads"]) > 10
    scale = max(grad.abs().max() for grad in expected.values())
    assert scale > 1e-3
    for name, grad in expected.items():
        torch.testing.assert_close(step["grads"][name], grad, atol=tolerance * scale, rtol=1e-3, msg=name)
