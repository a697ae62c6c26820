"""config.py: presets, plain dicts, and errors that name what is wrong."""

import dataclasses
import json

import numpy as np
import pytest

from ulmfit_fast.config import (
    PRESETS,
    STAGES,
    ClassifierConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    make_config,
)

pytestmark = pytest.mark.cpu_only("pure functions")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(stage, preset):
    config = make_config(stage, preset)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_paper_recipe():
    pretrain = make_config("pretrain", "ulmfit")
    assert pretrain.model_config() == ModelConfig(400, 1152, 3)
    for config in (make_config("finetune", "ulmfit"), make_config("classify", "ulmfit")):
        assert config.dropouts() == dict(output_p=0.4, hidden_p=0.3, input_p=0.4, embed_p=0.05, weight_p=0.5)
        assert (config.beta1, config.beta2, config.discriminative) == (0.7, 0.99, 2.6)
        assert (config.schedule, config.cut_frac, config.ratio, config.batch_size) == ("stlr", 0.1, 32, 64)
    assert make_config("finetune", "ulmfit").lr == 4e-3 and make_config("classify", "ulmfit").lr == 1e-2
    small = make_config("pretrain", "small")
    assert small.model_config() == ModelConfig(200, 576, 3)


def test_overrides_win_over_config_over_preset():
    config = make_config("pretrain", "tiny", dict(lr=0.5, epochs=7), dict(epochs=3))
    assert (config.lr, config.epochs, config.emb_sz) == (0.5, 3, PRESETS["tiny"]["pretrain"]["emb_sz"])
    whole = PretrainConfig(lr=0.25)
    assert make_config("pretrain", "tiny", whole, dict(seed=3)) == dataclasses.replace(whole, seed=3)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PretrainConfig().lr = 1.0


def test_an_integer_is_a_float_but_not_the_other_way():
    assert type(PretrainConfig(lr=1).lr) is float
    with pytest.raises(TypeError, match=r"PretrainConfig.epochs must be int, got 1.5"):
        PretrainConfig(epochs=1.5)


def test_numbers_of_numpy_are_numbers():
    config = PretrainConfig(lr=np.float32(0.5), weight_decay=np.float64(0.25), epochs=np.int64(2))
    assert (config.lr, config.weight_decay, config.epochs) == (0.5, 0.25, 2)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    with pytest.raises(TypeError, match="epochs must be int"):
        PretrainConfig(epochs=np.bool_(True))
    assert PretrainConfig(backwards=np.bool_(True)).backwards is True


def test_unknown_key_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown PretrainConfig option 'batchsize'; did you mean 'batch_size'\?.*bptt"
    ):
        make_config("pretrain", "tiny", overrides=dict(batchsize=3))
    with pytest.raises(ValueError, match=r"unknown preset 'smal'; did you mean 'small'\?"):
        make_config("pretrain", "smal")
    with pytest.raises(ValueError, match=r"unknown FinetuneConfig option 'backwards'\. Valid: alpha"):
        make_config("finetune", "tiny", overrides=dict(backwards=True))  # nothing is near


@pytest.mark.parametrize(
    ("cls", "values", "error", "message"),
    [
        (
            PretrainConfig,
            dict(weight_p=1.0),
            ValueError,
            r"weight_p is a dropout probability .* \[0, 1\), got 1.0",
        ),
        (
            PretrainConfig,
            dict(weight_p=0.5, drop_mult=2.2),
            ValueError,
            r"weight_p=0.5 times drop_mult=2.2 is 1.1;",
        ),
        (PretrainConfig, dict(beta1=1), ValueError, r"PretrainConfig.beta1 must be in \[0, 1\), got 1.0"),
        (ClassifierConfig, dict(label_smoothing=1), ValueError, r"smoothing must be in \[0, 1\), got 1.0"),
        (ClassifierConfig, dict(eps=0), ValueError, "ClassifierConfig.eps must be at least 1e-30, got 0.0"),
        (PretrainConfig, dict(seed=2**64), ValueError, f"seed must be at most {2**63 - 1}, got {2**64}"),
        (PretrainConfig, dict(lr=-1.0), ValueError, "lr must be at least 0, got -1.0"),
        (PretrainConfig, dict(lr=float("nan")), ValueError, "lr must be finite"),
        (PretrainConfig, dict(epochs=0), ValueError, "epochs must be at least 1, got 0"),
        (PretrainConfig, dict(epochs=True), TypeError, "epochs must be int, got True"),
        (
            PretrainConfig,
            dict(precision="fp8"),
            ValueError,
            "precision must be one of 'fp32', 'bf16', got 'fp8'",
        ),
        (FinetuneConfig, dict(discriminative=0.5), ValueError, "discriminative must be at least 1"),
        (ClassifierConfig, dict(gradual_unfreezing=1), TypeError, "gradual_unfreezing must be bool"),
        (ClassifierConfig, dict(batch_size=1), ValueError, "batch_size must be at least 2"),
    ],
)
def test_bad_values(cls, values, error, message):
    with pytest.raises(error, match=message):
        cls(**values)


def test_every_field_has_help():
    for cls in STAGES.values():
        assert all(f.metadata["help"] for f in dataclasses.fields(cls))
