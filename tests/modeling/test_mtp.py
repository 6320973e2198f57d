"""Multi-token prediction against the paper's equations written out, and against the library's MTP layers."""

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_layers import MtpModel

from modeling_deepseek_r1.mtp import document_ids, shifted_labels

from .helpers import YARN, close, gradients, library_twin, padded, random_ids, tiny_model

LENGTHS = (5, 1, 4, 2)  # documents of a packed row; the short ones have no target at some depth


# --- the paper's equations, a token and a head at a time -----------------------------------------------------------


def plain_norm(x, weight, eps=1e-6):
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def plain_rotation(x, position, config):
    """Channel pairs (2i, 2i+1) as complex numbers, turned by position * theta^(-2i/R)."""
    size = config.qk_rope_head_dim
    angles = position * config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2).float() / size)
    return torch.view_as_real(
        torch.view_as_complex(x.view(-1, 2)) * torch.polar(torch.ones_like(angles), angles)
    ).flatten()


def plain_attention(attention, states, config):
    """V3, Eqs. 1-11, for one sequence: list of (D,) -> list of (D,)."""
    nope, rope, heads = config.qk_nope_head_dim, config.qk_rope_head_dim, config.num_attention_heads
    queries, keys, values, outputs = [], [], [], []
    for position, x in enumerate(states):
        c_q = plain_norm(attention.q_a_proj.weight @ x, attention.q_a_layernorm.weight)
        down = attention.kv_a_proj_with_mqa.weight @ x
        c_kv = plain_norm(down[: config.kv_lora_rank], attention.kv_a_layernorm.weight)
        k_rope = plain_rotation(down[config.kv_lora_rank :], position, config)
        q = (attention.q_b_proj.weight @ c_q).view(heads, nope + rope)
        kv = (attention.kv_b_proj.weight @ c_kv).view(heads, nope + config.v_head_dim)
        queries.append([torch.cat((q[h, :nope], plain_rotation(q[h, nope:], position, config))) for h in range(heads)])
        keys.append([torch.cat((kv[h, :nope], k_rope)) for h in range(heads)])
        values.append([kv[h, nope:] for h in range(heads)])
        output = []
        for h in range(heads):
            scores = torch.stack([queries[position][h] @ keys[j][h] for j in range(position + 1)])
            shares = (scores / (nope + rope) ** 0.5).softmax(0)
            output.append(sum(shares[j] * values[j][h] for j in range(position + 1)))
        outputs.append(attention.o_proj.weight @ torch.cat(output))
    return outputs


def plain_mlp(mlp, x):
    return mlp.down_proj.weight @ (F.silu(mlp.gate_proj.weight @ x) * (mlp.up_proj.weight @ x))


def plain_moe(moe, x, config):
    """V3, Eqs. 12-16 and node-limited routing, for one token."""
    scores = (moe.gate.weight @ x).sigmoid()
    biased = scores + moe.gate.e_score_correction_bias
    size = config.n_routed_experts // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    groups.sort(key=lambda experts: -sum(sorted((float(biased[e]) for e in experts), reverse=True)[:2]))
    allowed = [e for experts in groups[: config.topk_group] for e in experts]
    chosen = sorted(allowed, key=lambda e: -float(biased[e]))[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen)
    output = plain_mlp(moe.shared_experts, x)
    for e in chosen:
        gate, up = (moe.experts.gate_up_proj[e] @ x).chunk(2)
        expert = moe.experts.down_proj[e] @ (F.silu(gate) * up)
        output = output + config.routed_scaling_factor * scores[e] / total * expert
    return output


def plain_mtp(model, ids, states):
    """V3, Eqs. 21-23, for one sequence of T tokens: -> per depth k the T - k states that predict token i + k + 1."""
    config, depths = model.config, []
    for k, layer in enumerate(model.model.mtp_layers, start=1):
        inputs = []
        for i in range(len(ids) - k):
            following = model.model.embed_tokens.weight[ids[i + k]]
            halves = plain_norm(following, layer.enorm.weight), plain_norm(states[i], layer.hnorm.weight)
            inputs.append(layer.eh_proj.weight @ torch.cat(halves))
        attended = plain_attention(
            layer.self_attn, [plain_norm(x, layer.input_layernorm.weight) for x in inputs], config
        )
        middle = [x + y for x, y in zip(inputs, attended, strict=True)]
        states = [
            x + plain_moe(layer.mlp, plain_norm(x, layer.post_attention_layernorm.weight), config) for x in middle
        ]
        states = [plain_norm(x, layer.shared_head["norm"].weight) for x in states]
        depths.append(torch.stack(states))
    return depths


def mtp_model(depth, **changes):
    return tiny_model(num_nextn_predict_layers=depth, **changes)


def depth_states(model, ids, **inputs):
    """-> h^0, [h^1, h^2, ...] of our model, each (B, S, D)."""
    main = model.model(ids, use_cache=False, **inputs).last_hidden_state  # packing is looked for without a cache only
    arguments = {"inputs_embeds": None, "attention_mask": None, "position_ids": None} | inputs
    return main, list(model.mtp_hidden_states(main, ids, **arguments))


# --- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_states_logits_and_loss_equal_the_papers_equations(depth, implementation):
    model, ids = mtp_model(depth, implementation=implementation), random_ids(2, 9)
    _, ours = depth_states(model, ids)
    main = library_twin(model).model(ids).last_hidden_state
    losses = [[] for _ in range(depth)]
    for row in range(2):
        for k, states in enumerate(plain_mtp(model, ids[row].tolist(), main[row].unbind()), start=1):
            close(ours[k - 1][row, : 9 - k], states)
            logits = states @ model.lm_head.weight.T
            close(model.lm_head(ours[k - 1])[row, : 9 - k], logits)
            losses[k - 1] += [-logits[i].log_softmax(0)[ids[row, i + k + 1]] for i in range(9 - k - 1)]
    with torch.enable_grad():
        output = model.train()(ids, labels=ids)
    # Divided by the number of main targets, (S - 1) a row, as Eq. 24's 1 / T is the same for every depth.
    close(output.mtp_loss, sum(sum(at_depth) for at_depth in losses) / depth / 16)


@pytest.mark.parametrize(
    "changes", [{}, {"rope_parameters": YARN}, {"rope_interleave": False, "n_group": 1, "topk_group": 1}]
)
@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_states_equal_the_librarys_mtp_layers(depth, changes):
    model, ids = mtp_model(depth, **changes), random_ids(2, 9)
    twin = library_twin(model)
    library = MtpModel(twin, depth).eval()
    library.set_attn_implementation("eager")
    prefixes = ("enorm", "hnorm", "eh_proj")
    for layer, ours in zip(library.layers, model.model.mtp_layers, strict=True):
        weights = {
            name if name.startswith(prefixes) else f"mtp_block.{name}": value
            for name, value in ours.state_dict().items()
        }
        weights["post_norm.weight"] = weights.pop("mtp_block.shared_head.norm.weight")
        layer.load_state_dict(weights)
    _, states = depth_states(model, ids)
    expected = twin.model(ids).last_hidden_state
    for k in range(1, depth + 1):
        positions = torch.arange(k, 9).unsqueeze(0)
        expected = library.forward_layer(k - 1, expected[:, : 9 - k], positions, None, input_ids=ids[:, k:])
        close(states[k - 1][:, : 9 - k], expected)


@pytest.mark.parametrize("depth", [1, 2])
def test_loss_is_main_plus_weighted_mtp(depth):
    model, ids = mtp_model(depth, mtp_loss_coef=0.7), random_ids()
    evaluated = model(ids, labels=ids)
    trained = model.train()(ids, labels=ids)
    assert evaluated.mtp_loss is None and trained.mtp_loss > 0
    close(trained.loss, evaluated.loss + 0.7 * trained.mtp_loss)
    close(evaluated.loss, library_twin(model)(ids, labels=ids).loss)  # the main loss alone
    summed = model(ids, labels=ids, num_items_in_batch=40)
    close(summed.loss, trained.loss * 20 / 40)
    close(summed.mtp_loss, trained.mtp_loss * 20 / 40)


def test_the_mtp_loss_reaches_every_parameter():
    model, ids = mtp_model(2, mtp_loss_coef=1.0), random_ids()
    model.train().balance_loss_scale = 0.0
    output = model(ids, labels=ids)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-5, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_mtp_loss(side):
    """A padded batch has the summed loss of its rows alone. A row's first three tokens are no targets here: in a left
    padded batch, the positions before the row would predict them."""
    model = mtp_model(2).train()
    ids, mask, labels = padded(random_ids(3, 12), side, (0, 5, 2))
    expected = 0.0
    for row, real in enumerate(mask.bool()):
        labels[row, real.nonzero()[:3]] = -100
        alone, targets = ids[row, real][None], labels[row, real][None]
        expected = expected + model(alone, labels=targets, num_items_in_batch=1).mtp_loss
    close(model(ids, attention_mask=mask, labels=labels, num_items_in_batch=1).mtp_loss, expected)


@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_mtp_routers_count_only_tokens_with_a_successor_to_combine(side):
    """Depth k counts the length - k entries of a sequence that have a token k ahead; decoder layers count them all."""
    model = mtp_model(2).train()
    if side == "packed":
        ids, positions = packed_row()
        lengths, arguments = LENGTHS, {"position_ids": positions, "labels": ids}
    else:
        ids, mask, labels = padded(random_ids(3, 12), side, (0, 5, 11))
        lengths, arguments = mask.sum(-1).tolist(), {"attention_mask": mask, "labels": labels}
    model(ids, **arguments).loss.backward()
    for layer, router in model.routers.items():
        depth = max(layer - 2, 0)  # layers 0 to 2 are the decoder's
        assert router.load_counts.sum() == 3 * sum(max(length - depth, 0) for length in lengths)  # top-3


def packed_row(lengths=LENGTHS):
    ids = random_ids(1, sum(lengths))
    return ids, torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_have_the_losses_they_have_alone(implementation):
    """Main losses token by token, MTP states and logits at every position that has a target, the summed MTP loss."""
    model = mtp_model(2, implementation=implementation)
    ids, positions = packed_row()
    packed = model.train()(ids, labels=ids, position_ids=positions, num_items_in_batch=1, return_token_losses=True)
    model.eval()
    main, states = depth_states(model, ids, position_ids=positions)
    start, mtp_total = 0, 0.0
    for length in LENGTHS:
        part = slice(start, start + length)
        alone = model.train()(ids[:, part], labels=ids[:, part], num_items_in_batch=1, return_token_losses=True)
        close(packed.token_losses[:, part], alone.token_losses)
        assert packed.token_losses[0, start + length - 1] == 0  # nothing is predicted across the border
        mtp_total = mtp_total + alone.mtp_loss
        model.eval()
        expected_main, expected = depth_states(model, ids[:, part])
        close(main[:, part], expected_main)
        for k in (1, 2):
            close(states[k - 1][:, start : start + length - k], expected[k - 1][:, : max(length - k, 0)])
        start += length
    close(packed.mtp_loss, mtp_total)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_no_prediction_crosses_a_document(implementation):
    """The gradient of one document's losses, of every depth, with respect to the others' embeddings is exactly 0."""
    model = mtp_model(2, implementation=implementation, mtp_loss_coef=1.0).train()
    model.balance_loss_scale = 0.0  # the balance loss looks at the whole row, by design
    ids, positions = packed_row()
    start = 0
    for length in LENGTHS:
        labels = torch.full_like(ids, -100)
        labels[:, start : start + length] = ids[:, start : start + length]
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        output = model(inputs_embeds=embeds, labels=labels, position_ids=positions, num_items_in_batch=1)
        (gradient,) = torch.autograd.grad(output.loss, embeds)
        inside = torch.zeros(ids.shape[1], dtype=torch.bool)
        inside[start : start + length] = True
        assert (gradient[0, ~inside] == 0).all()
        if length > 1:
            assert (gradient[0, inside][:-1].abs().amax(-1) > 0).all()
        start += length


def test_a_changed_token_changes_only_its_own_document():
    model = mtp_model(2).train()
    ids, positions = packed_row()
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 97  # first token of the third document, positions 6 to 9
    one, other = (
        model(x, labels=x, position_ids=positions, return_token_losses=True).token_losses for x in (ids, changed)
    )
    different = ((one - other).abs() > 1e-5)[0]  # not bit for bit: experts multiply other groups of tokens together
    assert different[6:9].all() and not different[:6].any() and not different[9:].any()
    (_, before), (_, after) = (depth_states(model, x, position_ids=positions) for x in (ids, changed))
    for k in (1, 2):
        valid = torch.cat([torch.arange(n) < n - k for n in LENGTHS])  # entries that have a token k ahead
        outside = torch.ones(12, dtype=torch.bool)
        outside[6:10] = False
        close(before[k - 1][0, valid & outside], after[k - 1][0, valid & outside])
        assert not torch.allclose(before[k - 1][0, valid & ~outside], after[k - 1][0, valid & ~outside], atol=0.01)


def test_packed_batch_of_several_rows_with_one_row_of_positions():
    model = mtp_model(1).train()
    ids, (_, positions) = random_ids(3, 12), packed_row()
    shared = model(ids, labels=ids, position_ids=positions)
    repeated = model(ids, labels=ids, position_ids=positions.expand(3, -1))
    close(shared.loss, repeated.loss, atol=0, rtol=0)


def test_inputs_embeds_give_the_same_mtp_loss():
    model, ids = mtp_model(2).train(), random_ids()
    by_ids = model(ids, labels=ids)
    by_embeds = model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids)
    assert torch.equal(by_ids.loss, by_embeds.loss) and torch.equal(by_ids.mtp_loss, by_embeds.mtp_loss)


def test_frozen_mtp_has_no_effect_and_no_gradient():
    model, ids = mtp_model(2).train(), random_ids()
    model.balance_loss_scale = 0.0
    model.freeze_mtp()
    assert not model.trains_mtp
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.mtp_loss is None
    twin = library_twin(model).train()
    expected = twin(ids, labels=ids).loss
    expected.backward()
    close(output.loss, expected)
    ours = gradients(model)
    assert ours.keys() == gradients(twin).keys()  # none of an MTP layer
    for name, gradient in gradients(twin).items():
        close(ours[name], gradient)


@pytest.mark.parametrize("target", ["q_b_proj", "eh_proj"])
def test_adapters_on_mtp_layers_are_trained(target):
    """A base weight that PEFT froze must not switch off the loss of its adapters: DDP needs every gradient."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(mtp_model(1), LoraConfig(r=2, target_modules=[target], init_lora_weights=False)).train()
    ids = random_ids()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.mtp_loss > 0
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


def test_zero_coefficient_computes_no_mtp():
    model, ids = mtp_model(1, mtp_loss_coef=0.0).train(), random_ids()
    assert model(ids, labels=ids).mtp_loss is None


def test_training_on_top_of_a_cache_predicts_only_the_new_tokens():
    """Labels with `past_key_values` (as prefix methods pass them): the mask covers more than the new tokens."""
    model, ids = mtp_model(1), random_ids(2, 10)
    with torch.no_grad():
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    with torch.no_grad():
        main = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1][:, 4:]
        (states,) = model.mtp_hidden_states(main, ids[:, 4:], None, mask[:, 4:], None)
    loss = F.cross_entropy(model.lm_head(states[:, :-2]).flatten(0, 1), ids[:, 6:].flatten(), reduction="sum")
    output = model.train()(
        ids[:, 4:], attention_mask=mask, past_key_values=cache, labels=ids[:, 4:], num_items_in_batch=1
    )
    close(output.mtp_loss, loss)


def test_document_ids_and_shifted_labels():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 0]])
    documents = document_ids(positions)
    assert documents.tolist() == [[0, 0, 0, 1, 2, 2, 3, 4]]
    labels = torch.arange(10, 18).unsqueeze(0)
    assert shifted_labels(labels, 1, documents).tolist() == [[11, 12, -100, -100, 15, -100, -100, -100]]
    assert shifted_labels(labels, 2, documents).tolist() == [[12, -100, -100, -100, -100, -100, -100, -100]]
    assert shifted_labels(labels, 2).tolist() == [[12, 13, 14, 15, 16, 17, -100, -100]]
    assert shifted_labels(labels, 9).tolist() == [[-100] * 8]
