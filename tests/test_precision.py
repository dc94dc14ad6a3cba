"""Fast precision stays close to exact on the nano model."""

from bench.precision import measure


def test_fast_agrees_with_exact() -> None:
    for name, agreement in measure(30).items():
        assert agreement.tokens > 300, name
        assert agreement.mean_kl < 2e-3, name
        assert agreement.top1 >= 0.99, name
