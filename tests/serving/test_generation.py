"""A row on its way: what ends it, and what it has then."""

import numpy as np

from moejax.generation_config import GenerationSettings
from moejax.serving.decoding import Details, Routed, Scores
from moejax.serving.generation import Row, TokenScore, score_token

SCORES = Scores(np.array([-1.0, -2.0]), np.array([[4, 5, 6], [7, 8, 9]]), np.array([[-0.5, -1.0, -3.0], [-0.1, -4.0, -5.0]]))


def test_it_ends_at_a_stop_id_which_is_not_part_of_it():
    row = Row([1], GenerationSettings(5), (2,), None)
    for token in (7, 8, 2):
        assert not row.ended
        row.add(token, Details(), 0)
    assert (row.generation.tokens, row.generation.finish_reason) == ([7, 8], "stop")


def test_it_ends_with_its_number_of_tokens_also_where_they_were_taken():
    row = Row([1], GenerationSettings(3), (), None)
    for token in (7, 8, 9):
        assert not row.ended
        row.add(token, Details(), 0)
        row.generation.take()
    assert (row.generation.tokens, row.generation.finish_reason) == ([], "length")
    assert Row([1], GenerationSettings(0), (), None).ended


def test_scores_are_those_of_its_own_place():
    assert score_token(7, SCORES, 1, 2) == TokenScore(7, -2.0, ((7, -0.1), (8, -4.0)))
    row = Row([1], GenerationSettings(2, logprobs=1), (), None)
    row.add(4, Details(SCORES), 0)
    assert row.generation.logprobs == [TokenScore(4, -1.0, ((4, -0.5),))]


def test_its_routing_is_of_the_prompt_without_padding_and_then_of_every_token_read():
    row = Row([5, 6], GenerationSettings(2), (), None)
    experts = np.arange(2 * 4 * 3 * 2).reshape(2, 4, 3, 2)
    row.add_prompt(Details(None, Routed(experts, experts / 100)), 1)
    row.add(9, Details(), 1)  # the first token, chosen from the prompt's logits
    assert row.generation.routing is None
    row.add(9, Details(None, Routed(experts[:, 0] + 1000, experts[:, 0] / 10)), 1)
    made = row.generation.routing
    assert np.array_equal(made.experts, np.concatenate([experts[1, :2], experts[1, :1] + 1000]))
    assert np.array_equal(made.weights, np.concatenate([experts[1, :2] / 100, experts[1, :1] / 10]))
