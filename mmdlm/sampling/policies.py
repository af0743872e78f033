"""Policies: which of the drawn tokens to write in this pass. One published rule each.

A policy is a closure View -> Decision. It sees only the asked places, each row for itself; what is not masked it leaves
alone. The loop writes what is still masked on a block's last pass, so a policy needs no rule for its end.

Shape letters: B rows, W asked places, V columns of the logits. t = 1 - step / steps is the time of a pass, s the next.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.sampling.denoise import Decision, Policy, View
from mmdlm.sampling.draws import Draw, categorical, greedy, gumbel, uniform
from mmdlm.schedules import Schedule, schedule_by_name

# ---------------------------------------------------------------- a planned number of tokens per pass


def maskgit(
    *,
    schedule: str | Schedule = "maskgit",
    choice_temperature: float = 0.0,
    decay: str = "linear",
    keep: Callable[[View], Tensor] | None = None,
    noise: Callable[[View], Tensor] | None = None,
) -> Policy:
    """Keep floor(n_start * (1 - alpha(s))) places masked, at least one and fewer than now; write the surest others.

    MaskGIT, arXiv:2202.04200, 3.2. The ranking is log(confidence) + temperature * Gumbel noise, the temperature being
    `choice_temperature` times, with r = 1 - s the share of the steps made: "linear" 1 - r (MaskGIT), "product" the
    product of 1 - r over the passes so far (as MMaDA's code, arXiv:2505.15809), "constant" 1 (Lumina-DiMOO,
    arXiv:2510.06308). MaskGIT's code leaves one mask in the canvas after the last round; here none remains.

    A published program's own count of masks and order of random numbers: `keep` instead of the number above, long [B],
    and `noise` instead of the rows' own Gumbel noise, [B, W]; see `mmdlm.sampling.published`.
    """
    alpha = _schedule(schedule).alpha
    _check("choice_temperature", choice_temperature, choice_temperature >= 0, "0 or more")
    _check("decay", decay, decay in ("linear", "product", "constant"), "linear, product or constant")

    def policy(view: View) -> Decision:
        left, (_, s) = view.masked.sum(dim=1), _times(view)
        # 1e-9: the equation's whole numbers (16 * cos(pi / 3)) must not be lost to the last bit of the cosine
        planned = torch.floor(view.n_start * (1 - alpha(s)) + 1e-9).long().clamp(min=1).minimum(left - 1)
        score = view.confidence.log()
        if noise is not None or choice_temperature > 0:
            luck = gumbel(view.generator, view.editable) if noise is None else noise(view)
            score = score + (choice_temperature * choice_decay(decay, view)).unsqueeze(1) * luck
        return Decision(_best(score, view.masked, left - (planned if keep is None else keep(view))))

    return policy


def top_k(*, confidence: str = "probability") -> Policy:
    """Write the n surest places, where n_start is split evenly over the steps, the first ones getting the remainder.

    LLaDA's low-confidence remasking, arXiv:2502.09992, 2.4 and Algorithm 5 (get_num_transfer_tokens). `confidence`:
    "probability" of the drawn token; "random" (LLaDA's random remasking); "margin" between the two likeliest tokens
    (arXiv:2502.06768, 4); "entropy", negative, of the place (Dream, arXiv:2508.15487).
    """
    measure = _measure(confidence)

    def policy(view: View) -> Decision:
        steps = view.steps.clamp(min=1)
        n = view.n_start // steps + (view.step < view.n_start % steps).long()
        return Decision(_best(measure(view), view.masked, n))

    return policy


# ---------------------------------------------------------------- as many tokens as are sure


def threshold(tau: float = 0.9) -> Policy:
    """Write every place whose confidence is at least `tau` in (0, 1], and always the surest one.

    Fast-dLLM, arXiv:2505.22618, Algorithm 1. Pass `steps=None` to denoise: the number of passes is the rule's to find.
    """
    _check("tau", tau, 0 < tau <= 1, "a confidence in (0, 1]")

    def policy(view: View) -> Decision:
        return Decision(view.masked & (view.confidence >= tau) | _best(view.confidence, view.masked, 1))

    return policy


def factor(f: float = 1.0, *, accept_last: bool = False) -> Policy:
    """Write the n surest places while (n + 1) * (1 - c_n) <= f holds for the n-th surest, and always the first.

    Fast-dLLM's factor, arXiv:2505.22618, 3.3 (Theorem 1). `accept_last`: as in the released code, a row whose only
    failure is the least sure of all its masked places writes that one too.
    """
    _check("f", f, f > 0, "more than 0")

    def policy(view: View) -> Decision:
        order = _order(view.confidence, view.masked)
        ranked, left = view.confidence.gather(1, order), view.masked.sum(dim=1)
        rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        holds = (ranked >= 1 - f / (rank + 1)) | (rank == 1)
        n = holds.long().cumprod(dim=1).sum(dim=1).minimum(left)
        if accept_last:
            n = torch.where((n == left - 1) & (left > 1), left, n)
        return Decision(_best(view.confidence, view.masked, n))

    return policy


def entropy_bound(gamma: float = 0.1) -> Policy:
    """Write the largest set of least entropies whose sum, without the largest of them, is at most `gamma` nats.

    EB-Sampler, arXiv:2505.24857: the bound on the error of drawing these places independently. It always
    writes at least one place; `gamma` >= 0.
    """
    _check("gamma", gamma, gamma >= 0, "0 or more, in nats")

    def policy(view: View) -> Decision:
        entropy = -_negative_entropy(view)
        ranked = entropy.gather(1, _order(-entropy, view.masked)).double()
        n = (ranked.cumsum(dim=1) - ranked <= gamma).long().cumprod(dim=1).sum(dim=1)
        return Decision(_best(-entropy, view.masked, n))

    return policy


# ---------------------------------------------------------------- the reverse process itself


def ancestral(*, schedule: str | Schedule = "linear") -> Policy:
    """Write each masked place, independently, with probability (alpha_s - alpha_t) / (1 - alpha_t).

    MDLM, arXiv:2406.07524, 3.2; UniDisc, arXiv:2503.20853. Meant for a categorical draw.
    """
    alpha = _schedule(schedule).alpha

    def policy(view: View) -> Decision:
        t, s = _times(view)
        odds = (alpha(s) - alpha(t)) / (1 - alpha(t))
        return Decision(view.masked & (uniform(view.generator, view.editable) < odds.unsqueeze(1)))

    return policy


def remdm(
    *,
    schedule: str | Schedule = "linear",
    eta: float = 0.1,
    rule: str = "cap",
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
) -> Policy:
    """Ancestral sampling that masks written places again with probability sigma. Needs denoise(..., revise=True).

    ReMDM, arXiv:2503.00307, 3.1 and 4: sigma_max = min(1, (1 - alpha_s) / alpha_t); "cap" sigma =
    min(eta, sigma_max), "rescale" sigma = eta * sigma_max; a masked place is written with probability
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t). `eta` in [0, 1]; 0 is `ancestral`.

    "loop": no remasking while t > t_on, where alpha rises from 0 to `alpha_on`; then alpha stays there and places are
    masked again with sigma = min(eta, sigma_max) until t <= t_off; then alpha rises to 1 without remasking. Only this
    rule uses `t_on` > `t_off`, both in (0, 1), and `alpha_on` in (0, 1).
    """
    given = _schedule(schedule).alpha
    _check("eta", eta, 0 <= eta <= 1, "a probability in [0, 1]")
    _check("rule", rule, rule in ("cap", "rescale", "loop"), "cap, rescale or loop")
    _check("t_off", t_off, 0 < t_off < t_on, f"a time in (0, t_on = {t_on!r})")
    _check("t_on", t_on, t_on < 1, "a time in (t_off, 1)")
    _check("alpha_on", alpha_on, 0 < alpha_on < 1, "a share in (0, 1)")

    def alpha(t: Tensor) -> Tensor:
        if rule != "loop":
            return given(t)
        before, after = ((t - t_on) / (1 - t_on)).clamp(min=0), (t / t_off).clamp(max=1)
        return torch.where(t > t_off, alpha_on * given(before), alpha_on + (1 - alpha_on) * given(after))

    def policy(view: View) -> Decision:
        t, s = _times(view)
        most = ((1 - alpha(s)) / alpha(t)).clamp(max=1)  # alpha(1) = 0: infinity, clamped
        sigma = eta * most if rule == "rescale" else most.clamp(max=eta)
        if rule == "loop":
            sigma = sigma * ((t <= t_on + 1e-9) & (t > t_off + 1e-9))  # 1 - 19 / 20 is not 0.05 to the last bit
        odds = (alpha(s) - (1 - sigma) * alpha(t)) / (1 - alpha(t))
        luck = uniform(view.generator, view.editable)
        written = view.editable & ~view.masked
        return Decision(view.masked & (luck < odds.unsqueeze(1)), written & (luck < sigma.unsqueeze(1)))

    return policy


# ---------------------------------------------------------------- what is written may change


def with_edits(policy: Policy | Mapping[str, Any] | str, *, tau: float = 0.9) -> Policy:
    """`policy`, and every written place whose draw differs from what stands there and is at least `tau` sure is
    rewritten. Needs denoise(..., revise=True); a block ends when nothing is masked and nothing was rewritten.

    LLaDA2.1's token-to-token edits, arXiv:2602.08676 (there the draw is greedy and `policy` is threshold, with a
    `tau` of its own); Seed Diffusion's edit stage trains for it, arXiv:2508.02193. `policy` may be a mapping, as in
    `policy_from_config`, or a name. A model that was trained on masks alone has never learned what to say where a token
    stands: wrap its predictor in `mmdlm.sampling.shadows.shadowed`, or do not edit.
    """
    policy = {"name": policy} if isinstance(policy, str) else policy
    inner = policy_from_config(policy) if isinstance(policy, Mapping) else policy
    _check("policy", policy, callable(inner), "a rule such as {name: threshold}")
    _check("tau", tau, 0 < tau <= 1, "a confidence in (0, 1]")

    def policy_with_edits(view: View) -> Decision:
        decision = inner(view)
        edit = view.editable & ~view.masked & (view.x0 != view.x) & (view.confidence >= tau)
        return decision._replace(write=decision.write | edit, settled=~edit.any(dim=1))

    return policy_with_edits


def revoke(*, draft: float = 0.6, verify: float = 0.9) -> Policy:
    """Write every place at least `draft` sure, and always the surest; mask again what is written and now less likely
    than `verify`, the least likely first and always fewer than are written. Needs denoise(..., revise=True).

    WINO, arXiv:2507.18578, 3.2: wide in, narrow out. How likely a written token is has to be asked without showing it
    to the model: wrap the predictor in `mmdlm.sampling.shadows.shadowed`. Every pass leaves at least one mask fewer, so
    `steps=None` is always enough; a block ends when nothing in it is masked.
    """
    _check("draft", draft, 0 < draft <= 1, "a confidence in (0, 1]")
    _check("verify", verify, 0 < verify <= 1, "a confidence in (0, 1]")

    def policy(view: View) -> Decision:
        write = view.masked & (view.confidence >= draft) | _best(view.confidence, view.masked, 1)
        written = view.editable & ~view.masked
        column = (view.x - view.first_id).clamp(0, view.logits.shape[-1] - 1).unsqueeze(-1)  # any, where it is masked
        likely = view.logits.log_softmax(dim=-1).gather(-1, column).squeeze(-1).exp()
        doubted = written & (likely < verify)
        most = (write.sum(dim=1) - 1).clamp(min=0).minimum(doubted.sum(dim=1))
        return Decision(write, _best(-likely, doubted, most), settled=torch.ones_like(most, dtype=torch.bool))

    return policy


# ---------------------------------------------------------------- from a preset or a YAML

# Rules that look at written places too, and rules that find the number of passes themselves.
REVISING, ADAPTIVE = ("remdm", "with_edits", "revoke"), ("threshold", "factor", "entropy_bound", "revoke")
# Rules that ask what the model says of a written token, which it must not see: `mmdlm.sampling.shadows.shadowed`.
SHADOWED = ("with_edits", "revoke")


def policy_from_config(config: Mapping[str, Any]) -> Policy:
    """The policy of {"name": ..., **settings}; InputError names the nearest where a name or a setting is unknown."""
    rules = (maskgit, top_k, threshold, factor, entropy_bound, ancestral, remdm, with_edits, revoke)
    return _call("policy", {rule.__name__: rule for rule in rules}, config)


def draw_from_config(config: Mapping[str, Any]) -> Draw:
    """The draw of {"name": "greedy"} or {"name": "categorical", "temperature": ...}; InputError as for a policy."""
    return _call("draw", {"greedy": lambda: greedy, "categorical": categorical}, config)


def _call(kind: str, functions: Mapping[str, Callable[..., Any]], config: Mapping[str, Any]) -> Any:
    settings = dict(config)
    name = settings.pop("name", None)
    if name is None:
        raise InputError(f"the {kind} {settings} has no name, expected one of {', '.join(functions)}: add its name")
    if name not in functions:
        raise InputError(_unknown(f"{kind} name", name, list(functions)))
    known = list(inspect.signature(functions[name]).parameters)
    for key in settings:
        if key not in known:
            raise InputError(_unknown(f"setting of the {kind} {name}", key, known))
    try:
        return functions[name](**settings)
    except TypeError as error:  # a value of the wrong kind, or one that has no default and is not given
        raise InputError(f"the {kind} {name} cannot be made of {settings} ({error}): change its settings") from error


def _unknown(what: str, got: object, known: list[str]) -> str:
    if not known:
        return f"unknown {what}: {got!r}, expected no settings: leave it out"
    (near,) = difflib.get_close_matches(str(got), known, n=1, cutoff=0.0)
    return f"unknown {what}: {got!r}, expected one of {', '.join(known)}: did you mean {near}?"


# ---------------------------------------------------------------- shared by several rules


def _best(score: Tensor, masked: Tensor, n: Tensor | int) -> Tensor:
    """True at the n masked places of highest score per row (all of them if there are fewer), the left one of equals."""
    ranks = _order(score, masked).argsort(dim=1)
    limit = n.unsqueeze(1) if isinstance(n, Tensor) else n
    return masked & (ranks < limit)


def _order(score: Tensor, masked: Tensor) -> Tensor:
    """Indices of the places, masked ones first, by falling score; equal ones in order of position."""
    order = score.argsort(dim=1, descending=True, stable=True)
    # twice sorted, so that a masked place of score -inf still comes before one that is not masked
    return order.gather(1, (~masked).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))


def _times(view: View) -> tuple[Tensor, Tensor]:
    """t and s, float64 [B]; float64 because rounded counts hang on them. A row that is done gets t = 1, s = 0."""
    steps = view.steps.clamp(min=1).double()
    return 1 - view.step / steps, 1 - (view.step + 1) / steps


def choice_decay(decay: str, view: View) -> Tensor:
    """The share of `maskgit`'s choice temperature that is left in this pass: float64 [B] in [0, 1]."""
    _, s = _times(view)
    if decay != "product":
        return s if decay == "linear" else torch.ones_like(s)
    # prod_{i=0..k} (T - 1 - i) / T = (T - 1)! / (T - 2 - k)! / T^(k + 1), 0 at the last pass
    total, passes = view.steps.clamp(min=1).double(), view.step + 1.0
    return (total.lgamma() - (total - passes).clamp(min=0).lgamma() - passes * total.log()).exp()


def _measure(name: str) -> Callable[[View], Tensor]:
    measures: dict[str, Callable[[View], Tensor]] = {
        "probability": lambda view: view.confidence,
        "random": lambda view: uniform(view.generator, view.editable),
        "margin": _margin,
        "entropy": _negative_entropy,
    }
    if name not in measures:
        raise InputError(_unknown("confidence", name, list(measures)))
    return measures[name]


def _margin(view: View) -> Tensor:
    top = (view.logits.topk(2, dim=-1).values - view.logits.logsumexp(dim=-1, keepdim=True)).exp()
    return top[..., 0] - top[..., 1]


def _negative_entropy(view: View) -> Tensor:
    logs = view.logits.log_softmax(dim=-1)
    return (logs.exp() * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(dim=-1)  # 0 * -inf counts as 0


def _schedule(schedule: str | Schedule) -> Schedule:
    return schedule_by_name(schedule) if isinstance(schedule, str) else schedule


def _check(name: str, got: object, fine: bool, expected: str) -> None:
    if not fine:
        raise InputError(f"{name} is {got!r}, expected {expected}: change {name} in the policy's settings")
