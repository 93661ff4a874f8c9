"""Make the polynomial coefficients of src/core/ground/exp.h: near-minimax (Chebyshev) fits at 60 digits.

Run ``python tools/polynomials.py`` (needs mpmath). Each line gives the coefficients from the highest power
down, ready for Horner's rule, and the largest relative error of the whole function they serve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpmath import chebyfit, cos, exp, expm1, fabs, linspace, log, mp, mpf, polyval, sin, sqrt

mp.dps = 60
HALF_LN2 = log(2) / 2
S_MAX = ((sqrt(2) - 1) / (sqrt(2) + 1)) ** 2
QUARTER_PI2 = (mp.pi / 4) ** 2
Function = Callable[[Any], Any]


def series(f: Function, x: Any, taylor: list[Any]) -> Any:
    """f(x), or its Taylor series where f would divide 0 by 0."""
    return polyval(taylor[::-1], x) if fabs(x) < mpf("1e-9") else f(x)


def expm1_tail(r: Any) -> Any:
    """Q(r) in exp(r) - 1 = r + r^2 Q(r)."""
    return series(lambda r: (expm1(r) - r) / r**2, r, [1 / mp.factorial(k + 2) for k in range(6)])


def log_tail(z: Any) -> Any:
    """R(s^2) in log((1 + s) / (1 - s)) = 2 s + s^3 R(s^2)."""

    def f(z: Any) -> Any:
        s = sqrt(z)
        return (log((1 + s) / (1 - s)) - 2 * s) / s**3

    return series(f, z, [mpf(2) / (2 * k + 3) for k in range(6)])


def sin_tail(z: Any) -> Any:
    """S(r^2) in sin(r) = r + r^3 S(r^2)."""
    return series(
        lambda z: (sin(sqrt(z)) - sqrt(z)) / sqrt(z) ** 3,
        z,
        [(-1) ** (k + 1) / mp.factorial(2 * k + 3) for k in range(6)],
    )


def cos_tail(z: Any) -> Any:
    """C(r^2) in cos(r) = 1 - r^2 / 2 + r^4 C(r^2)."""
    return series(
        lambda z: (cos(sqrt(z)) - 1 + z / 2) / z**2, z, [(-1) ** k / mp.factorial(2 * k + 4) for k in range(6)]
    )


def fit(name: str, f: Function, interval: tuple[Any, Any], terms: int, whole: Function, exact: Function) -> None:
    """Print the coefficients of f on the interval and the relative error of whole(x, f(x)) against exact(x)."""
    coefficients = chebyfit(f, list(interval), terms)
    worst = max(
        fabs(whole(x, polyval(coefficients, x)) / exact(x) - 1)
        for x in linspace(*interval, 1001)
        if fabs(x) > mpf("1e-6")
    )
    print(f"{name}: relative error {mp.nstr(worst, 3)}")
    print("   ", ", ".join(mp.nstr(c, 20) for c in coefficients))


if __name__ == "__main__":
    for kind, terms in (("float", (5, 4)), ("double", (12, 8))):
        fit(f"exp, {kind}", expm1_tail, (-HALF_LN2, HALF_LN2), terms[0], lambda r, q: 1 + r + r * r * q, exp)
        fit(
            f"log, {kind}",
            log_tail,
            (mpf(0), S_MAX),
            terms[1],
            lambda z, r: 2 * sqrt(z) + z * sqrt(z) * r,
            lambda z: log((1 + sqrt(z)) / (1 - sqrt(z))),
        )
    fit(
        "sin, double",
        sin_tail,
        (mpf(0), QUARTER_PI2),
        7,
        lambda z, s: sqrt(z) + z * sqrt(z) * s,
        lambda z: sin(sqrt(z)),
    )
    fit("cos, double", cos_tail, (mpf(0), QUARTER_PI2), 7, lambda z, c: 1 - z / 2 + z * z * c, lambda z: cos(sqrt(z)))
