"""Scaling laws: published tables, minima found by search, and laws recovered from their own losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from forge.errors import PlanError
from forge.plan.llama_shape import LlamaShape, llama_shape
from forge.plan.scaling import (
    BESIROGLU,
    HOFFMANN,
    HOFFMANN_1,
    KAPLAN,
    ModelScale,
    ScalingLaw,
    batch_and_rate,
)
from forge.plan.scaling_fit import RunPoint, check_held_out, fit_law, fit_warnings, next_scale

TABLE_3 = [
    (400e6, 1.92e19, 8.0e9),
    (1e9, 1.21e20, 20.2e9),
    (10e9, 1.23e22, 205.1e9),
    (67e9, 5.76e23, 1.5e12),
    (175e9, 3.85e24, 3.7e12),
    (280e9, 9.90e24, 5.9e12),
    (520e9, 3.43e25, 11.0e12),
    (1e12, 1.27e26, 21.2e12),
    (10e12, 1.30e28, 216.2e12),
]
"""Parameters, FLOPs and tokens by approach 1. Source: Hoffmann et al. 2022, arXiv 2203.15556, table 3."""
TABLE_A3 = [
    (400e6, 2.21e19, 9.2e9),
    (1e9, 1.62e20, 27.1e9),
    (10e9, 2.46e22, 410.1e9),
    (67e9, 1.71e24, 4.1e12),
    (280e9, 3.52e25, 20.1e12),
    (520e9, 1.36e26, 43.5e12),
    (1e12, 5.65e26, 94.1e12),
    (10e12, 8.55e28, 1425.5e12),
]
"""By approach 3: table A3. Its row of 175 billion is left out: its FLOPs are not 6·N·D, but a tenth of that."""


@pytest.mark.parametrize(("parameters", "flops", "tokens"), TABLE_3)
def test_approach_1__table_3_of_hoffmann__within_5_percent(parameters: float, flops: float, tokens: float) -> None:
    scale = HOFFMANN_1.best_scale(flops)
    assert scale.num_parameters == pytest.approx(parameters, rel=0.05)
    assert scale.num_tokens == pytest.approx(tokens, rel=0.05)


@pytest.mark.parametrize(("parameters", "flops", "tokens"), TABLE_3)
def test_corrected_law__table_3_of_hoffmann__agrees_with_approach_1(
    parameters: float, flops: float, tokens: float
) -> None:
    """The correction's point: approach 3 now agrees with approach 1, here within 25 % over nine decades."""
    scale = BESIROGLU.best_scale(flops)
    assert scale.num_parameters == pytest.approx(parameters, rel=0.25)
    assert scale.num_tokens == pytest.approx(tokens, rel=0.25)


@pytest.mark.parametrize(("parameters", "flops", "tokens"), TABLE_A3)
def test_approach_3__table_a3_of_hoffmann__as_near_as_its_rounded_constants(
    parameters: float, flops: float, tokens: float
) -> None:
    scale = HOFFMANN.best_scale(flops)
    assert scale.num_parameters == pytest.approx(parameters, rel=0.08)
    assert scale.num_tokens == pytest.approx(tokens, rel=0.12)


def test_exponents__of_besiroglu__as_published() -> None:
    """a = β/(α + β) = 0.513: Besiroglu et al. 2024, section 3."""
    grown = BESIROGLU.best_scale(1e24).num_parameters / BESIROGLU.best_scale(1e20).num_parameters
    assert math.log10(grown) / 4 == pytest.approx(0.513, abs=0.001)


def test_kaplan__ten_times_the_flops__parameters_times_5_4() -> None:
    """Hoffmann et al. 2022, introduction, quote 5.5 times the parameters and 1.8 times the tokens."""
    small, large = KAPLAN.best_scale(1e20), KAPLAN.best_scale(1e21)
    assert large.num_parameters / small.num_parameters == pytest.approx(5.5, rel=0.03)
    assert large.num_tokens / small.num_tokens == pytest.approx(1.8, rel=0.04)
    one_petaflop_day = KAPLAN.best_scale(8.64e19)
    assert one_petaflop_day.num_parameters == pytest.approx(1.3e9)
    assert KAPLAN.loss(8.64e19) == pytest.approx(3.1e8**0.050)


@given(st.floats(15, 28), st.floats(0, 15))
def test_best_scale__any_flops_and_inference__least_total_flops_of_its_loss(
    log_flops: float, log_inference: float
) -> None:
    inference = 10**log_inference
    best = BESIROGLU.best_scale(10**log_flops, inference_tokens=inference)
    assert best.training_flops == pytest.approx(10**log_flops)
    loss = BESIROGLU.loss(best)

    def total(log_parameters: float) -> float:
        of_tokens = loss - BESIROGLU.irreducible_loss - 482.01 / math.exp(log_parameters) ** 0.3478
        if of_tokens <= 0:
            return 1e9
        scale = ModelScale(
            num_parameters=math.exp(log_parameters), num_tokens=(2085.43 / of_tokens) ** (1 / 0.3658)
        )
        return math.log(scale.total_flops(inference_tokens=inference))

    middle = math.log(best.num_parameters)
    found = minimize_scalar(total, bounds=(middle - 3, middle + 3), method="bounded", options={"xatol": 1e-7})
    assert total(middle) <= found.fun + 1e-6


def test_best_scale__more_inference__smaller_model_on_more_tokens() -> None:
    scales = [HOFFMANN.best_scale(1e22, inference_tokens=tokens) for tokens in (0, 1e11, 1e12, 1e13)]
    assert [scale.num_parameters for scale in scales] == sorted((s.num_parameters for s in scales), reverse=True)
    assert [HOFFMANN.loss(scale) for scale in scales] == sorted(HOFFMANN.loss(scale) for scale in scales)


def test_batch_and_rate__1e21_flops__by_deepseek() -> None:
    advice = batch_and_rate(ModelScale(num_parameters=1e9, num_tokens=1e21 / 6e9))
    assert advice.batch_tokens == pytest.approx(2.16e6, rel=0.01)
    assert advice.learning_rate == pytest.approx(7.4e-4, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        ((4096, 11008, 32, 32, 32, 32000, False), 6_738_415_616),  # Llama 2 7B
        ((8192, 28672, 80, 64, 8, 32000, False), 68_976_648_192),  # Llama 2 70B
        ((4096, 14336, 32, 32, 8, 128256, False), 8_030_261_248),  # Llama 3 8B
        ((8192, 28672, 80, 64, 8, 128256, False), 70_553_706_496),  # Llama 3 70B
        ((576, 1536, 30, 9, 3, 49152, True), 134_515_008),  # SmolLM2 135M
    ],
)
def test_llama__published_models__their_parameter_counts(shape: tuple[int, ...], published: int) -> None:
    """The counts of the safetensors files of the models on the Hub."""
    hidden, mlp, layers, heads, kv_heads, vocab, is_tied = shape
    counted = LlamaShape(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=bool(is_tied),
    )
    assert counted.num_parameters == published


@pytest.mark.parametrize("wanted", [20e6, 125e6, 1.3e9, 7e9, 70e9, 175e9, 1e12])
def test_shape__wanted_size__near_it_and_of_usual_proportions(wanted: float) -> None:
    shape = llama_shape(int(wanted), vocab_size=32768)
    assert shape.num_parameters == pytest.approx(wanted, rel=0.06)
    assert shape.hidden_size % shape.num_attention_heads == 0
    assert shape.num_attention_heads % shape.num_key_value_heads == 0
    assert 24 <= shape.hidden_size / shape.num_hidden_layers <= 160


def points_of(law: ScalingLaw, *, count: int = 6, noise: float = 0.0, ratio: float = 5.0) -> list[RunPoint]:
    rng = np.random.default_rng(3)
    points = []
    for step in range(count):
        scale = ModelScale(num_parameters=1e5 * 2**step, num_tokens=ratio * 1e5 * 2**step)
        points.append(
            RunPoint(
                name=f"run-{step}",
                num_parameters=round(scale.num_parameters),
                num_tokens=round(scale.num_tokens),
                loss=law.loss(scale) * math.exp(noise * rng.normal()),
            )
        )
    return points


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU], ids=["hoffmann", "besiroglu"])
def test_fit__noisy_losses_of_a_law__predicts_the_held_out_largest(law: ScalingLaw) -> None:
    points = points_of(law, noise=0.005)
    checked = check_held_out(points)
    assert checked is not None
    assert checked.name == "run-5"
    assert abs(checked.error) < 0.03
    fitted = fit_law(points)
    ten_times = ModelScale(num_parameters=3.2e7, num_tokens=1.6e8)
    expected = fitted.loss_range(ten_times)
    assert expected is not None
    assert expected.low - 0.05 < law.loss(ten_times) < expected.high + 0.05
    near = fitted.loss_range(points[3].scale)
    assert near is not None
    assert expected.high - expected.low > near.high - near.low


def test_fit__other_law_and_enough_runs__follows_the_runs_not_the_prior() -> None:
    steep = ScalingLaw(
        name="steep",
        irreducible_loss=1.0,
        parameter_factor=4000,
        parameter_exponent=0.5,
        token_factor=4000,
        token_exponent=0.45,
    )
    points = points_of(steep, count=5) + points_of(steep, count=5, ratio=50.0)
    fitted = fit_law(points)
    assert fitted.parameter_exponent == pytest.approx(0.5, abs=0.04)
    assert fitted.token_exponent == pytest.approx(0.45, abs=0.04)


@pytest.mark.parametrize(("points", "problem"), [(points_of(HOFFMANN, count=2), "at least 3"), ([], "at least 3")])
def test_fit__too_few_runs__error_with_their_number(points: list[RunPoint], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        fit_law(points)


def test_fit__equal_runs__error() -> None:
    same = points_of(HOFFMANN, count=1) * 4
    with pytest.raises(PlanError, match="runs that differ"):
        fit_law(same)


def test_fit__ladder_with_one_ratio__warns_and_continues_the_ladder() -> None:
    points = points_of(HOFFMANN, count=4)
    assert "grow together" in fit_warnings(points)[0]
    scale = next_scale(points)
    assert (scale.num_parameters, scale.num_tokens) == (1.6e6, 8e6)
