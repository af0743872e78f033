"""Text that must fit a format: a regular expression, or JSON of a schema, in places that are filled in any order.

A model of masks writes where it is surest, not from left to right, so a format is no filter on the next token. Here it
is an automaton over token ids, and each pass asks for the joint distribution of all open places given the written ones:

    q(w) = prod_i p_i(w_i) / Z  over the words w that the automaton accepts and that agree with what is written

with p_i the model's own softmax. The forward and backward sums of a hidden Markov model give its marginals and its
likeliest words (Viterbi) exactly, in one sweep over the places. What is drawn is one such sequence, so whatever part of
it the policy writes, the rest can still be completed; the confidence of a token is its marginal under q.

Shape letters: B rows, L positions, W asked places, V columns, P places of a span, S states, E edges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.sampling.denoise import Predictor
from mmdlm.sampling.draws import Draw
from mmdlm.sampling.policies import draw_from_config

_STOP = b"\x00"  # after the last word of a pattern


class Automaton(NamedTuple):
    """A regular language over token ids. State 0 is the start."""

    source: Tensor  # int64 [E]
    token: Tensor  # int64 [E]
    target: Tensor  # int64 [E]
    accepting: Tensor  # bool [S]


class Span(NamedTuple):
    """Places [P] of one row, in reading order, whose tokens must be words of the automaton."""

    row: int
    places: Tensor
    automaton: Automaton


def pattern_of_schema(schema: str | Mapping[str, Any]) -> str:
    """The regular expression of the JSON that a JSON schema describes; at most single spaces between its parts.

    Raises InputError for a schema that is none, or that needs more than regular expressions can say.
    """
    text = schema if isinstance(schema, str) else json.dumps(schema)
    _outlines()
    from outlines_core import json_schema

    try:
        return str(json_schema.build_regex_from_schema(text, whitespace_pattern=" ?"))
    except (ValueError, TypeError) as error:
        raise InputError(f"The JSON schema is not understood ({error}), expected one of objects with named properties, "
                         "strings, numbers, enums and lists: simplify it.") from error


def automaton_of_pattern(
    pattern: str, tokens: Mapping[bytes, int | Sequence[int]], *, eos_id: int, ends: bool = False
) -> Automaton:
    """The automaton of a regular expression (of Rust's `regex`), anchored at both ends.

    tokens: the bytes of every token that may be written, without special ones. ends: the text may stop before the
    places do; eos then fills the rest. Raises InputError for a pattern that is none, or that no tokens can spell.
    """
    outlines = _outlines()
    listed = {text: [ids] if isinstance(ids, int) else list(ids) for text, ids in tokens.items()
              if text and _STOP not in text}
    stop = 1 + max([eos_id, *(number for ids in listed.values() for number in ids)])
    try:
        # Behind a stop of our own no state that a word passes is a final one: outlines-core (0.2.14) loses the moves
        # from final states to others, the second "ab" of (ab)+ for one.
        index = outlines.Index(f"(?:{pattern})\\x00", outlines.Vocabulary(stop + 1, {**listed, _STOP: [stop]}))
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"The pattern {pattern!r} is not understood ({reason}), expected a regular expression such as "
                         "'(a|one) [a-z]+': mend it.") from error
    final, moves = index.get_final_states(), index.get_transitions()
    number, edges, last, queue = {index.get_initial_state(): 0}, [], [], [index.get_initial_state()]
    for state in queue:
        for token, after in sorted(moves.get(state, {}).items()):
            if token == stop:
                last += [number[state]] if after in final else []
            elif token <= stop:
                if after not in number:
                    number[after] = len(number)
                    queue.append(after)
                edges.append((number[state], token, number[after]))
    if ends:
        edges += [(state, eos_id, len(number)) for state in [*last, len(number)]]
        last.append(len(number))
    accepting = torch.zeros(len(number) + ends, dtype=torch.bool)
    accepting[last] = True
    source, token, target = torch.tensor(edges, dtype=torch.long).view(-1, 3).unbind(1)
    return Automaton(source, token, target, accepting)


def token_bytes(tokens: Iterable[tuple[str, int]], special: Iterable[int]) -> dict[bytes, list[int]]:
    """The bytes behind a byte-level BPE's (token, id) pairs, special ids left out. InputError for another tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    left_out = set(special)
    found: dict[bytes, list[int]] = {}
    for text, number in tokens:
        if number in left_out:
            continue
        if not all(letter in byte_of for letter in text):
            raise InputError(f"The token {text!r} is not spelled in bytes, expected a byte-level tokenizer for "
                             "formats: use choices, [MASK:{a|b}], with this model.")
        found.setdefault(bytes(byte_of[letter] for letter in text), []).append(number)
    return found


class Formats:
    """The formats of a canvas, for one run of `denoise`: wrap its predictor by `predict` and its draw by `draw`.

    The two work as a pair: the predictor notes the canvas, whose written tokens the draw must agree with.
    `first_id`: the id of the logits' first column. Raises InputError where a span has room for no word of its format.
    """

    def __init__(self, spans: Sequence[Span], *, mask_id: int, first_id: int = 0) -> None:
        self.spans, self.mask_id, self.first_id = list(spans), mask_id, first_id
        self.canvas: Tensor | None = None
        for span in self.spans:
            _check_room(span)

    def predict(self, predict: Predictor) -> Predictor:
        """`predict`, its logits untouched."""

        def noted(ids: Tensor, where: Tensor) -> Tensor:
            self.canvas = ids
            return predict(ids, where)

        return noted

    def draw(self, draw: Draw, *, temperature: float = 0.0) -> Draw:
        """`draw` outside the spans; in them the likeliest words (temperature 0), or words drawn from q's tempered form.

        A span whose places are drawn takes one number per place from its row's generator.
        """

        def drawn(
            logits: Tensor, where: Tensor, asked: Tensor, generators: list[torch.Generator]
        ) -> tuple[Tensor, Tensor]:
            columns, sure = draw(logits, where, asked, generators)
            assert self.canvas is not None  # the predictor was asked before
            for span in self.spans:
                known = self.canvas[span.row, span.places.to(where.device)]
                at = {place: slot for slot, place in enumerate(where[span.row].tolist()) if asked[span.row, slot]}
                slots = [at.get(place, -1) for place in span.places.tolist()]
                if max(slots) < 0:
                    continue
                words, odds = self._words(span, known, slots, logits[span.row], temperature, generators[span.row])
                here = torch.tensor([slot for slot in slots if slot >= 0], device=where.device)
                chosen = torch.tensor([slot >= 0 for slot in slots])
                columns[span.row, here] = (words[chosen] - self.first_id).to(columns)
                sure[span.row, here] = odds[chosen].to(sure)
            return columns, sure

        return drawn

    def draw_from_config(self, config: Mapping[str, Any]) -> Draw:
        """`draw` of a preset's {"name": ..., "temperature": ...}: its temperature is that of the words too."""
        heat = 0.0 if config["name"] == "greedy" else float(config.get("temperature", 1.0))
        return self.draw(draw_from_config(config), temperature=heat)

    def _words(
        self, span: Span, known: Tensor, slots: list[int], logits: Tensor, temperature: float, chance: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The span's tokens [P] and the marginal of each under q, float64 [P]."""
        machine, open_ = span.automaton, (known == self.mask_id).tolist()
        shares = logits.double().log_softmax(dim=-1).cpu()
        column = machine.token - self.first_id
        inside = ((column >= 0) & (column < shares.shape[1])).nonzero()[:, 0]
        moves = []
        for place, slot in enumerate(slots):
            edges = inside if open_[place] else (machine.token == known[place].cpu()).nonzero()[:, 0]
            # a masked place that is not asked in this pass may still become anything
            free = not open_[place] or slot < 0
            moves.append((edges, torch.zeros(len(edges)).double() if free else shares[slot][column[edges]]))
        heated = moves if temperature == 0 else [(edges, score / temperature) for edges, score in moves]
        words = _likeliest(machine, moves) if temperature == 0 else _sampled(machine, heated, chance)
        return words, _marginals(machine, moves, words)


def _check_room(span: Span) -> None:
    machine, places = span.automaton, len(span.places)
    reached = torch.zeros(len(machine.accepting), dtype=torch.bool)
    reached[0] = True
    lengths = []
    for length in range(1, 4 * places + 64):
        now = torch.zeros_like(reached)
        now[machine.target[reached[machine.source]]] = True
        reached = now
        if bool((reached & machine.accepting).any()):
            lengths.append(length)
    if places not in lengths:
        near = sorted(sorted(lengths, key=lambda length: abs(length - places))[:4])
        named = ", ".join(map(str, near)) or "none of any length"
        raise InputError(f"The format has no text of {places} tokens, expected one it has (nearest: {named}): give the "
                         "hole another number of tokens, or change the pattern.")


# What may stand at each place: the edges' indices and the log odds of their tokens there.
_Moves = list[tuple[Tensor, Tensor]]


def _forward(machine: Automaton, moves: _Moves) -> list[Tensor]:
    """log of the summed odds of all ways to each state [S], before each place and after the last: P + 1 of them."""
    start = torch.full((len(machine.accepting),), -torch.inf, dtype=torch.float64)
    start[0] = 0.0
    sums = [start]
    for edges, score in moves:
        sums.append(_log_sum(sums[-1][machine.source[edges]] + score, machine.target[edges], len(start)))
    return sums


def _backward(machine: Automaton, moves: _Moves) -> list[Tensor]:
    """log of the summed odds of all ways from each state [S] to acceptance, in the order of `_forward`."""
    sums = [torch.zeros(len(machine.accepting), dtype=torch.float64).masked_fill(~machine.accepting, -torch.inf)]
    for edges, score in reversed(moves):
        ways = sums[-1][machine.target[edges]] + score
        sums.append(_log_sum(ways, machine.source[edges], len(machine.accepting)))
    return sums[::-1]


def _log_sum(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """log of the sum of exp(values [E]) in each group: [groups], -inf where there is none."""
    top = torch.full((groups,), -torch.inf, dtype=values.dtype).scatter_reduce(0, group, values, "amax")
    safe = top.masked_fill(top == -torch.inf, 0.0)
    total = torch.zeros(groups, dtype=values.dtype).index_add(0, group, (values - safe[group]).exp())
    return total.log() + safe


def _marginals(machine: Automaton, moves: _Moves, words: Tensor) -> Tensor:
    """q's probability of each token of `words` [P] at its place."""
    before, after = _forward(machine, moves), _backward(machine, moves)
    whole = after[0][0]
    odds = []
    for place, (edges, score) in enumerate(moves):
        ways = before[place][machine.source[edges]] + score + after[place + 1][machine.target[edges]]
        odds.append((ways[machine.token[edges] == words[place]].logsumexp(0) - whole).exp())
    return torch.stack(odds).clamp(max=1.0)


def _likeliest(machine: Automaton, moves: _Moves) -> Tensor:
    """Viterbi: the accepted words [P] of the highest summed score; of equals the one whose edges come first."""
    states, none = len(machine.accepting), len(machine.token)
    best = torch.full((states,), -torch.inf, dtype=torch.float64)
    best[0] = 0.0
    taken = []
    for edges, score in moves:
        ways, into = best[machine.source[edges]] + score, machine.target[edges]
        best = torch.full((states,), -torch.inf, dtype=torch.float64).scatter_reduce(0, into, ways, "amax")
        equal = torch.where(ways == best[into], edges, none)
        taken.append(torch.full((states,), none).scatter_reduce(0, into, equal, "amin"))
    state = best.masked_fill(~machine.accepting, -torch.inf).argmax()
    words = []
    for edge_into in reversed(taken):
        edge = edge_into[state]
        words.append(machine.token[edge])
        state = machine.source[edge]
    return torch.stack(words[::-1])


def _sampled(machine: Automaton, moves: _Moves, chance: torch.Generator) -> Tensor:
    """Words [P] drawn exactly, place by place, each edge by its odds times those of all ways on from it."""
    after = _backward(machine, moves)
    luck = torch.rand(len(moves), generator=chance, dtype=torch.float64, device=chance.device).cpu()
    state, words = 0, []
    for place, (edges, score) in enumerate(moves):
        ways = score + after[place + 1][machine.target[edges]]
        upto = ways.masked_fill(machine.source[edges] != state, -torch.inf).softmax(dim=0).cumsum(dim=0)
        edge = edges[(upto <= luck[place] * upto[-1]).sum().clamp(max=len(edges) - 1)]
        words.append(machine.token[edge])
        state = int(machine.target[edge])
    return torch.stack(words)


def _outlines() -> Any:
    try:
        import outlines_core
    except ImportError as error:
        raise InputError("Formats need outlines-core, which is not installed: pip install 'mmdlm[formats]'.") from error
    return outlines_core
