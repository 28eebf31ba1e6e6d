"""Exercises and quiz of `05_p_tuning`."""

import torch

from labkit.exercises import Choice, Exercise, Quiz, Result, correct, not_yet


def _check_count(answer) -> Result:
    if answer == 122_880:
        return correct("10 tokens, a key and a value of 512 each, in each of 12 layers")
    if answer == 61_440:
        return not_yet("a virtual token has a key *and* a value in every layer")
    if answer == 10_240:
        return not_yet("that is one layer, or prompt tuning: a prefix stands in every layer")
    if answer == 5_120:
        return not_yet("that is the keys of one layer: add the values, and the other layers")
    if answer == 245_760:
        return not_yet("keys have the width of the heads that hold keys, not of the whole model")
    return not_yet("tokens, times layers, times what one token has in one layer")


def _check_share(answer) -> Result:
    if abs(answer - 1 / 3) < 0.005:
        return correct("20 times e^0 is 20, against 5 times 8, which is 40: a third is gone")
    if answer == 0:
        return not_yet("a key of zeros has score 0, and e^0 is 1, not 0: it takes its share")
    if abs(answer - 0.8) < 0.005:
        return not_yet("that counts tokens; the softmax weighs each by e to its score")
    if abs(answer - 2 / 3) < 0.005:
        return not_yet("that is what the text keeps: what does the prefix take?")
    if abs(answer - 0.5) < 0.005:
        return not_yet("that sets the prefix's 20 against another 20: add up the text's part anew")
    return not_yet("the prefix's sum of e^score, divided by the sum over prefix and text")


_Q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
_K = torch.tensor([[0.5, -0.5], [1.0, 0.0], [0.0, 2.0]])
_V = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]])
_PREFIX_K = torch.tensor([[2.0, 1.0]])
_PREFIX_V = torch.tensor([[-2.0, 5.0]])


def _attention(q, k, v):
    return torch.softmax(q @ k.T, dim=-1) @ v


def _check_attention(function) -> Result:
    given = (_Q, _K, _V, _PREFIX_K, _PREFIX_V)
    got = function(*(tensor.clone() for tensor in given))
    if not torch.is_tensor(got):
        return not_yet("return a tensor, one row a query")

    def same(wanted) -> bool:
        return got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-5)

    keys, values = torch.cat([_PREFIX_K, _K]), torch.cat([_PREFIX_V, _V])
    if same(_attention(_Q, keys, values)):
        return correct("one softmax over prefix and text together; no weight of the head changed")
    if same(_attention(_Q, _K, _V)):
        return not_yet("that is the head without its prefix")
    if same(_attention(_Q, _K, _V) + _attention(_Q, _PREFIX_K, _PREFIX_V)):
        return not_yet("two softmaxes give each side a whole share; they must compete in one")
    if same(torch.softmax(_Q @ keys.T, dim=0) @ values):
        return not_yet("the shares of one query must add up to 1: softmax over keys, the last axis")
    if same(_Q @ keys.T @ values):
        return not_yet("scores are not shares yet: a softmax stands between them and the values")
    if got.shape[0] == len(keys):
        return not_yet("one row a query: a prefix has keys and values, but no query of its own")
    return not_yet("the prefix's keys before the keys, its values before the values, then attend")


def _check_labels(function) -> Result:
    labels = [-100, -100, 7, 2]
    got = list(function(list(labels), 3))
    if got == [-100, -100, -100, -100, -100, 7, 2]:
        if list(function([9, 4], 1)) != [-100, 9, 4]:
            return not_yet("right for 3 virtual tokens; their number is the second argument")
        return correct("logits and labels are as long again, and no virtual token is an answer")
    if got == labels:
        return not_yet("the model now has 3 more positions than labels: torch would refuse")
    if got == [0, 0, 0, *labels]:
        return not_yet("0 is a real token, so the vectors would learn to be followed by padding")
    if got == [*labels, -100, -100, -100]:
        return not_yet("the virtual tokens stand before the text, and so do their labels")
    if got == [-100] * 7:
        return not_yet("nothing is learned from: the answer's labels must stay")
    return not_yet("for [-100, -100, 7, 2] and 3 virtual tokens, want seven labels")


EXERCISES = (
    Exercise(
        id="05-1",
        aim="Count what a prefix trains, where heads share their keys.",
        difficulty="easy",
        minutes=4,
        check=_check_count,
        hints=(
            "Where does a prefix stand: before the input, or in every layer?",
            "In one layer, a virtual token has a key and a value. How wide is a key here?",
            "8 heads hold keys, 64 wide each. Then: tokens x 2 x layers x that width.",
        ),
        wrong_answers=("61_440", "10_240", "5_120", "245_760"),
    ),
    Exercise(
        id="05-2",
        aim="Say how much attention an untrained prefix of zeros takes.",
        difficulty="medium",
        minutes=4,
        check=_check_share,
        hints=(
            "A key of zeros has score 0 with every query. What is e to the 0?",
            "The text's five words have score ln 8 each: e to the ln 8 is 8.",
            "20 x 1 for the prefix, 5 x 8 for the text: what part of the sum is the prefix's?",
        ),
        wrong_answers=("0", "0.8", "2 / 3", "0.5"),
    ),
    Exercise(
        id="05-3",
        aim="Write one attention head with a prefix.",
        difficulty="medium",
        minutes=8,
        check=_check_attention,
        hints=(
            "Attention without a prefix is softmax(q @ k.T) @ v, with the softmax over keys.",
            "The prefix competes with the text in the same softmax.",
            "torch.cat([prefix_k, k]) are the keys; do the same with the values.",
        ),
        wrong_answers=(
            "lambda q, k, v, pk, pv: (q @ k.T).softmax(-1) @ v",
            "lambda q, k, v, pk, pv: (q @ k.T).softmax(-1) @ v + (q @ pk.T).softmax(-1) @ pv",
            "import torch\n"
            "def answer(q, k, v, pk, pv):\n"
            "    return (q @ torch.cat([pk, k]).T).softmax(0) @ torch.cat([pv, v])",
            "import torch\n"
            "def answer(q, k, v, pk, pv):\n"
            "    return q @ torch.cat([pk, k]).T @ torch.cat([pv, v])",
        ),
    ),
    Exercise(
        id="05-4",
        aim="Label a row that stands behind virtual tokens.",
        difficulty="easy",
        minutes=5,
        check=_check_labels,
        hints=(
            "The model gets n_virtual positions more; how many labels must there be?",
            "No virtual token is an answer, so the loss must skip them: which label does that?",
            "[-100] * n_virtual, and then the labels of the text.",
        ),
        wrong_answers=(
            "lambda labels, n_virtual: labels",
            "lambda labels, n_virtual: [0] * n_virtual + labels",
            "lambda labels, n_virtual: labels + [-100] * n_virtual",
            "lambda labels, n_virtual: [-100] * (n_virtual + len(labels))",
        ),
    ),
)

QUIZZES = (
    Quiz(
        id="05-q1",
        question=(
            "With your trained prefix attached, tickets work and arithmetic has become wrong. "
            "A user asks for a sum. What gives exactly the old answer?"
        ),
        choices=(
            Choice(
                "Nothing needs to be done: the base is frozen.",
                "Its weights are, its answers are not: the prefix takes part in every one.",
            ),
            Choice(
                "Switch the prefix off for that request.",
                "No weight of the base has changed, so without the prefix every bit is as before.",
                right=True,
            ),
            Choice(
                "Train the prefix again at a lower rate.",
                "It may lose less, but it will not be exactly the base.",
            ),
            Choice(
                "Merge the prefix into the weights.",
                "A prefix has no weights to merge: it is keys and values beside the text's.",
            ),
        ),
    ),
)
