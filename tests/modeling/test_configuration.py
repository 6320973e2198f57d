"""The configuration: errors that name the field and the value, and released files that load unchanged."""

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from modeling_deepseek_r1 import DeepSeekR1Config

from .helpers import tiny_config

# fields -> what the message must contain: the field and its value at least
IMPOSSIBLE = [
    ({"n_routed_experts": 9}, ["n_routed_experts=9", "n_group=4", "[1, 3, 9]"]),
    ({"n_group": 3, "topk_group": 1}, ["n_routed_experts=8", "n_group=3"]),
    ({"num_experts_per_tok": 5}, ["num_experts_per_tok=5", "topk_group=2", "4 experts"]),
    ({"num_experts_per_tok": 9, "n_group": 1, "topk_group": 1}, ["num_experts_per_tok=9", "n_routed_experts=8"]),
    ({"num_experts_per_tok": 0}, ["num_experts_per_tok=0"]),
    ({"topk_group": 5}, ["topk_group=5", "n_group=4"]),
    ({"n_group": 8, "topk_group": 4}, ["n_group=8", "two best"]),
    ({"n_routed_experts": 0}, ["n_routed_experts=0"]),
    ({"moe_intermediate_size": 0}, ["moe_intermediate_size=0"]),
    ({"qk_rope_head_dim": 5}, ["qk_rope_head_dim=5", "even", "use 6"]),
    ({"qk_rope_head_dim": 0}, ["qk_rope_head_dim=0"]),
    ({"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers=-1"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers=0"]),
    ({"hidden_size": -4}, ["hidden_size=-4"]),
    ({"vocab_size": 0}, ["vocab_size=0"]),
    ({"q_lora_rank": 0}, ["q_lora_rank=0", "null"]),
    ({"kv_lora_rank": 0}, ["kv_lora_rank=0"]),
    ({"moe_layer_freq": 0}, ["moe_layer_freq=0"]),
    ({"first_k_dense_replace": -1}, ["first_k_dense_replace=-1"]),
    ({"num_key_value_heads": 2}, ["num_key_value_heads=2", "num_attention_heads=4"]),
    ({"scoring_func": "tanh"}, ["scoring_func='tanh'", "('sigmoid', 'noaux_tc')"]),
    ({"scoring_func": "softmax", "topk_method": "noaux_tc"}, ["'softmax'", "topk_method='noaux_tc'"]),
    ({"attention_types": ["latent", "banana", "latent"]}, ["attention_types", "banana", "latent"]),
    ({"attention_types": ["latent"]}, ["attention_types", "1", "num_hidden_layers=3"]),
    ({"attention_dropout": 1.0}, ["attention_dropout=1.0"]),
    ({"hidden_dropout": -0.1}, ["hidden_dropout=-0.1"]),
    ({"drop_path_rate": 1.5}, ["drop_path_rate=1.5"]),
    ({"label_smoothing": 1.0}, ["label_smoothing=1.0"]),
    ({"mtp_loss_coef": -0.3}, ["mtp_loss_coef=-0.3"]),
    ({"bias_update_speed": -0.001}, ["bias_update_speed=-0.001"]),
    ({"seq_aux_loss_alpha": -1.0}, ["seq_aux_loss_alpha=-1.0"]),
    ({"router_z_loss_coef": -1.0}, ["router_z_loss_coef=-1.0"]),
    ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, ["rope_type='nope'", "yarn"]),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["factor", "'yarn'"]),
    ({"n_shared_experts": -1}, ["n_shared_experts=-1"]),
    ({"num_experts_per_tok": None}, ["num_experts_per_tok=None"]),
    ({"hidden_act": "no_such_function"}, ["hidden_act", "no_such_function"]),
    ({"pad_token_id": 97}, ["pad_token_id=97", "vocab_size=97"]),
]


def name(value):
    return ",".join(f"{field}={value[field]}" for field in value) if isinstance(value, dict) else ""


@pytest.mark.parametrize("changes, named", IMPOSSIBLE, ids=name)
def test_impossible_configurations(changes, named):
    with pytest.raises(ValueError) as caught:
        tiny_config(**changes)
    for text in named:
        assert text in str(caught.value)


def test_an_impossible_configuration_is_a_value_error():
    with pytest.raises(ValueError, match="qk_rope_head_dim=5"):
        tiny_config(qk_rope_head_dim=5)


@pytest.mark.parametrize("changes", [{"hidden_size": "x"}, {"num_hidden_layers": 2.5}, {"q_lora_rank": "none"}])
def test_wrong_types_name_the_field(changes):
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"(?s)'{next(iter(changes))}'.*expected int"):
        tiny_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_group": None, "topk_group": None},
        {"n_routed_experts": None},
        {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 3, "topk_group": 1},  # greedy ignores groups
        {"n_shared_experts": None},
        {"num_nextn_predict_layers": None},
        {"moe_layer_freq": 2},
        {"attention_types": ["latent"] * 3},
        {"drop_path_rate": 0.0, "label_smoothing": 0},
    ],
)
def test_possible_configurations_survive_a_round_trip(changes, tmp_path):
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    assert DeepSeekR1Config.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_v2_files_get_the_defaults_of_v2():
    config = DeepSeekR1Config(model_type="deepseek_v2")
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("softmax", "greedy", False)
    assert (config.routed_scaling_factor, config.num_nextn_predict_layers) == (1.0, 0)
    kept = DeepSeekR1Config(model_type="deepseek_v2", num_nextn_predict_layers=1, routed_scaling_factor=16.0)
    assert (kept.routed_scaling_factor, kept.num_nextn_predict_layers) == (16.0, 1)
