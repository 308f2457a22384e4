"""The games in examples/: rules and texts against ones written down here, data against re-simulation, brute force."""

import json
import math
import re
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run_forked

sys.path.insert(0, str(ROOT / "examples"))

import maze  # noqa: E402
import wordle  # noqa: E402

# --- maze: rules ------------------------------------------------------------------------------------------------------

ACTIONS = {"move left\n": (0, -1), "move right\n": (0, 1), "move up\n": (-1, 0), "move down\n": (1, 0)}
CORRIDORS = ([(1, column) for column in (1, 2, 3, 4, 5, 7, 8, 9, 10, 11)] + [(row, 3) for row in (2, 3, 4)]
             + [(row, 9) for row in (2, 3, 4)] + [(5, column) for column in range(3, 10)] + [(6, 6), (7, 6), (8, 6)])
DISTANCES = {12: [(1, 1), (1, 5), (1, 7), (1, 11)], 11: [(1, 2), (1, 4), (1, 8), (1, 10)], 10: [(1, 3), (1, 9)],
             9: [(2, 3), (2, 9)], 8: [(3, 3), (3, 9)], 7: [(4, 3), (4, 9)], 6: [(5, 3), (5, 9)], 5: [(5, 4), (5, 8)],
             4: [(5, 5), (5, 7)], 3: [(5, 6)], 2: [(6, 6)], 1: [(7, 6)], 0: [(8, 6)]}


def moved(cell, action):
    """Where an action leads, by the list of corridors above."""
    beside = (cell[0] + ACTIONS[action][0], cell[1] + ACTIONS[action][1])
    return beside if beside in CORRIDORS else cell


def best_actions(cell):
    """The actions on a shortest path, from the table of distances."""
    distance = {cell: number for number, cells in DISTANCES.items() for cell in cells}
    return [action for action in ACTIONS if distance[moved(cell, action)] == distance[cell] - 1]


def expected_return(policy):
    """Exact mean return over the 25 starts of action shares {cell: {action: share}}, by backward induction."""
    value = {cell: -1.0 * (cell != (8, 6)) for cell in CORRIDORS}
    for _ in range(100):
        value = {cell: sum(share * (0 if moved(cell, action) == (8, 6) else value[moved(cell, action)] - 1)
                           for action, share in policy[cell].items()) if cell != (8, 6) else 0.0 for cell in CORRIDORS}
    return np.mean([value[cell] for cell in CORRIDORS if cell != (8, 6)])


UNIFORM = {cell: {action: 0.25 for action in ACTIONS} for cell in CORRIDORS}


def test_maze_cells_and_distances():
    assert len(CORRIDORS) == len(set(CORRIDORS)) == 26 and maze.FREE == set(CORRIDORS) and maze.GOAL == (8, 6)
    assert {(row, column) for row in range(10) for column in range(13)} - maze.FREE == {
        (row, column) for row in range(10) for column in range(13) if (row, column) not in CORRIDORS}
    assert [len(row) for row in maze.LAYOUT] == [13] * 10
    assert maze.DISTANCE == {cell: distance for distance, cells in DISTANCES.items() for cell in cells}
    distances = [maze.DISTANCE[cell] for cell in maze.STARTS]
    assert len(distances) == 25 and np.mean(distances) == pytest.approx(7.84)
    assert {cell: [move + "\n" for move in maze.BEST[cell]] for cell in maze.STARTS} == {
        cell: best_actions(cell) for cell in maze.STARTS}


GOAL_TEXT = "The goal is at position 8, 6. Your current position is at position "
LEFT, RIGHT, ABOVE, BELOW = "to your left", "to your right", "above you", "below you"
WALLS = {  # every cell but the goal
    f"There are walls {LEFT}, {ABOVE}, {BELOW}.": [(1, 1), (1, 7)],
    f"There are walls {RIGHT}, {ABOVE}, {BELOW}.": [(1, 5), (1, 11)],
    f"There are walls {ABOVE}, {BELOW}.": [(1, 2), (1, 4), (1, 8), (1, 10), (5, 4), (5, 5), (5, 7), (5, 8)],
    f"There is a wall {ABOVE}.": [(1, 3), (1, 9), (5, 6)],
    f"There are walls {RIGHT}, {LEFT}.": [(2, 3), (3, 3), (4, 3), (2, 9), (3, 9), (4, 9), (6, 6), (7, 6)],
    f"There are walls {LEFT}, {BELOW}.": [(5, 3)],
    f"There are walls {RIGHT}, {BELOW}.": [(5, 9)],
}


def test_maze_observations():
    assert maze.observe((1, 1)) == ("The goal is at position 8, 6. Your current position is at position 1, 1. "
                                    "There are walls to your left, above you, below you.\n")
    assert maze.observe((1, 10)) == GOAL_TEXT + "1, 1 0. There are walls above you, below you.\n"
    assert maze.observe((1, 11)) == GOAL_TEXT + "1, 1 1. There are walls to your right, above you, below you.\n"
    assert maze.observe((5, 3)) == GOAL_TEXT + "5, 3. There are walls to your left, below you.\n"
    assert sum(map(len, WALLS.values())) == 25
    for walls, cells in WALLS.items():
        assert all(maze.observe(cell).endswith(f". {walls}\n") for cell in cells), walls
    assert len(set(maze.starts())) == 25 and sorted(maze.starts()) == sorted(
        maze.observe(cell) for cell in CORRIDORS if cell != (8, 6))


def test_maze_steps():
    for cell in CORRIDORS[:-1]:
        for action in ACTIONS:
            after = moved(cell, action)
            wanted = (after, 0.0 if after == (8, 6) else -1.0, after == (8, 6))
            assert maze.step(cell, action) == maze.step(cell, action.removesuffix("\n")) == wanted
    assert maze.step((1, 1), "move up\n") == ((1, 1), -1.0, False)
    assert maze.step((1, 1), "move right\n") == ((1, 2), -1.0, False)
    assert maze.step((7, 6), "move down\n") == ((8, 6), 0.0, True)


@pytest.mark.parametrize("text", ["", "\n", " move down\n", "Move down\n", "move down\n\n", "move down ", "move  down",
                                  "down", "move down\nmove down\n"])
def test_maze_texts_that_are_no_move(text):
    assert maze.step((7, 6), text) == ((7, 6), -4.0, False)


def test_maze_normalised():
    assert [maze.normalised(raw) for raw in (-101, -83, -6.84)] == pytest.approx([0, 50, 100])
    assert maze.normalised(-92) == pytest.approx(25) and maze.normalised(-119) == pytest.approx(-50)
    assert maze.normalised(-6.97) == pytest.approx(99.9, abs=0.05)  # as published: ILQL, PPO
    assert maze.normalised(-37.7) == pytest.approx(79.7, abs=0.06)


WHERE = {maze.observe(cell): cell for cell in CORRIDORS}


# --- maze: play -------------------------------------------------------------------------------------------------------


def by_cell(choose):
    """A policy from a function of the cell that an observation names."""
    return lambda prompts: [choose(WHERE[prompt]) for prompt in prompts]


def test_maze_best_policy():
    found = maze.play(by_cell(lambda cell: best_actions(cell)[0].removesuffix("\n")), 2)
    assert found["return"] == pytest.approx(-6.84) and found["arrived"] == 1 and found["illegal"] == 0
    assert found["error"] == 0
    assert [found[f"from {cell}"] for cell in ("1,1", "1,5", "1,7", "1,11")] == [-11] * 4


def test_maze_means_are_over_starts_and_told_for_the_far_ends():
    found = maze.play(by_cell(lambda cell: best_actions(cell)[0] if cell[1] > 5 else "move left"), 3)
    assert [found[f"from {cell}"] for cell in ("1,1", "1,5", "1,7", "1,11")] == [-101, -101, -11, -11]
    assert found["arrived"] == pytest.approx(14 / 25)
    right = sum(distance - 1 for distance, cells in DISTANCES.items() for cell in cells if 5 < cell[1] != cell[0] - 2)
    stem = sum(distance - 1 for distance in (1, 2, 3))
    assert found["return"] == pytest.approx((11 * -101 - right - stem) / 25, abs=1) and stem == 3


@pytest.mark.parametrize("action,wanted", [("move up", -101), ("stay", -401), ("move up\n", -101)])
def test_maze_that_never_arrives(action, wanted):
    calls = []
    found = maze.play(lambda prompts: calls.append(len(prompts)) or [action] * len(prompts), 1)
    assert found["return"] == wanted and found["arrived"] == 0 and calls == [25] * 100
    assert found["illegal"] == float(action == "stay") and all(found[f"from {a},{b}"] == wanted for a, b in maze.FAR)


def test_maze_arriving_with_the_last_move():
    """From (1,1) the goal is 12 moves off: 12 allowed arrive, with 11 they do not, and pay 1 more."""
    policy = by_cell(lambda cell: best_actions(cell)[0])
    assert maze.play(policy, 1, max_steps=12)["arrived"] == 1
    found = maze.play(policy, 1, max_steps=11)
    assert found["arrived"] == pytest.approx(21 / 25) and found["from 1,1"] == -12


def test_maze_illegal_texts_are_a_share_of_all_texts():
    """Two moves in turn with an illegal text: that costs 4, and stays."""
    tried = Counter()

    def choose(cell):
        tried[cell] += 1
        return "jump" if tried[cell] % 2 else best_actions(cell)[0]

    found = maze.play(lambda prompts: [by_cell(choose)([prompt])[0] for prompt in prompts[:1]]
                      + ["stay"] * (len(prompts) - 1), 1)
    assert found["illegal"] > 0.9 and found["from 1,11"] == -401
    assert found["from 1,1"] == -11 - 12 * 4


def test_maze_uniform_policy():
    """At the exact value that backward induction gives, which is near the -85.3 of 5,000 rollouts elsewhere."""
    rng = np.random.default_rng(0)
    actions = list(ACTIONS)
    found = maze.play(lambda prompts: [actions[i] for i in rng.integers(4, size=len(prompts))], 32)
    exact = expected_return(UNIFORM)
    assert exact == pytest.approx(-85.89, abs=0.005) and abs(exact + 85.3) < 0.8
    assert abs(found["return"] - exact) < 4 * found["error"] and 0.5 < found["error"] < 1.5
    assert found["illegal"] == 0 and 0.1 < found["arrived"] < 0.4


def test_maze_error_is_that_of_the_mean():
    """The spread of many small evaluations is the error that each of them tells."""
    rng = np.random.default_rng(0)
    actions = list(ACTIONS)
    runs = [maze.play(lambda prompts: [actions[i] for i in rng.integers(4, size=len(prompts))], 2) for _ in range(40)]
    assert np.std([run["return"] for run in runs], ddof=1) == pytest.approx(np.mean([run["error"] for run in runs]),
                                                                           rel=0.4)


def test_maze_accuracy():
    prompts = [maze.observe((1, 1))] * 5 + [maze.observe((1, 11)), "move up\n" + maze.observe((5, 6))]
    outputs = ["move right", "move right\n", "move left", "Move right", "", "move left\n", "move down"]
    found = maze.accuracy(prompts=prompts, outputs=outputs, samples=None)
    assert found == {"optimal": [1, 1, 0, 0, 0, 1, 1], "illegal": [0, 0, 0, 1, 1, 0, 0]}


# --- maze: data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def games():
    return maze.data(seed=1)


def part_of(cell):
    """-1 and 1 for the sides, 0 for the corridor between them with the goal's dead end."""
    return 0 if cell[0] >= 5 else -1 if cell[1] < 6 else 1


def test_maze_rows_are_what_the_maze_does(games):
    """A row ends at the goal, with the first observation of another part, or after 100 moves."""
    seen, ends = Counter(), Counter()
    for row in games:
        observations, actions = [WHERE[text] for text in row["turns"][::2]], row["turns"][1::2]
        assert len(actions) == len(row["reward"]) <= 100
        for number, (cell, action) in enumerate(zip(observations, actions)):
            seen[cell, action] += 1
            after = moved(cell, action)
            last = number == len(actions) - 1
            assert row["reward"][number] == (0.0 if after == (8, 6) else -1.0)
            assert observations[number + 1] == after if after != (8, 6) else last and len(row["turns"]) % 2 == 0
        parts = [part_of(cell) for cell in observations]
        assert set(parts[: len(actions)]) == {parts[0]}
        if len(row["turns"]) % 2:
            assert len(observations) == len(actions) + 1
            ends["left" if parts[-1] != parts[0] else "long"] += 1
            assert parts[-1] != parts[0] or len(actions) == 100
        else:
            ends["arrived"] += 1
            assert parts[0] == 0 and row["reward"][-1] == 0.0
    assert set(seen) == {(cell, action) for cell in CORRIDORS[:-1] for action in ACTIONS}  # paths can be put together
    assert ends.total() == 1200 and len(ends) == 3 and min(ends.values()) >= 10


def test_maze_data_recipe(games):
    assert len(games) == 1200 and games[:20] == maze.data(20, seed=1) != maze.data(20, seed=2)
    first = Counter(row["turns"][0] for row in games)
    parts = Counter(part_of(WHERE[text]) for text in first.elements())
    assert abs(parts[0] / 1200 - 1 / 6) < 0.05 and abs(parts[-1] / 1200 - 5 / 12) < 0.06
    for text in maze.starts():  # 8, 9 and 8 cells
        alike = parts[part_of(WHERE[text])] / (9 if part_of(WHERE[text]) == 0 else 8)
        assert abs(first[text] - alike) < 4 * alike**0.5
    assert np.mean([len(row["turns"]) % 2 == 0 for row in games]) == pytest.approx(0.11, abs=0.03)
    assert np.mean([len(row["reward"]) for row in games]) == pytest.approx(24.4, abs=3)
    for cell, best in (((3, 3), "move down\n"), ((5, 6), "move down\n"), ((1, 1), "move right\n")):
        shares = Counter(action for row in games for text, action in zip(row["turns"][::2], row["turns"][1::2])
                         if text == maze.observe(cell))
        for move in ACTIONS:
            wanted = 0.85 / 4 + 0.15 * (move == best)
            assert shares[move] / shares.total() == pytest.approx(wanted, abs=3 / shares.total() ** 0.5)


def test_maze_data_all_best_or_all_random():
    for row in maze.data(100, best_share=1.0):
        cells = [WHERE[text] for text in row["turns"][::2]]
        if part_of(cells[0]) == 0:
            assert len(row["reward"]) == 8 - cells[0][0] + abs(cells[0][1] - 6) and cells[-1] == (7, 6)
        else:
            assert len(row["reward"]) == len(cells) - 1 and cells[-1] == (5, 3 if part_of(cells[0]) < 0 else 9)
    moves = Counter(action for row in maze.data(100, best_share=0.0)
                    for text, action in zip(row["turns"][::2], row["turns"][1::2]) if text == maze.observe((3, 9)))
    assert min(moves.values()) / moves.total() > 0.2


def test_maze_tabular_clone(games):
    """It earns what backward induction gives for the shares in the data, and knows no better than chance without."""
    counts = {cell: Counter() for cell in CORRIDORS}
    for row in games:
        for text, action in zip(row["turns"][::2], row["turns"][1::2]):
            counts[WHERE[text]][action] += 1
    shares = {cell: {action: count / found.total() for action, count in found.items()}
              for cell, found in counts.items()}
    found = maze.play(maze.tabular_clone(games, seed=3), 32)
    assert abs(found["return"] - expected_return(shares)) < 4 * found["error"] and found["illegal"] == 0
    one = [{"turns": [maze.observe((1, 1)), "move up\n", maze.observe((1, 1))], "reward": [-1.0]}]
    policy = maze.tabular_clone(one)
    assert set(policy([maze.observe((1, 1))] * 50)) == {"move up\n"}
    free = Counter(policy([maze.observe((1, 2))] * 4000))
    assert set(free) == set(ACTIONS) and min(free.values()) > 850
    again, other = maze.tabular_clone(games, seed=3), maze.tabular_clone(games, seed=4)
    asked = [maze.observe((1, 2))] * 50
    assert maze.tabular_clone(games, seed=3)(asked) == again(asked) != other(asked)


# --- Wordle: rules ----------------------------------------------------------------------------------------------------

WORDS = ["slate", "solar", "speed", "geese", "eerie", "crane", "allay", "llama", "madam", "nymph", "abbey", "kebab",
         "stall", "atlas", "roast", "toast", "coast", "boast", "beast", "least", "lease", "tease", "these", "sheet"]


def told(guess, word):
    """Feedback, another way round: by sets of places."""
    marks = ["b"] * 5
    for place in range(5):
        if {place} & {at for at in range(5) if word[at] == guess[place]}:
            marks[place] = "g"
        elif word.count(guess[place]):
            marks[place] = "y"
    return "".join(marks)


@pytest.mark.parametrize("guess,word,marks", [
    ("solar", "slate", "gbyyb"), ("slate", "slate", "ggggg"), ("nymph", "slate", "bbbbb"),
    ("geese", "speed", "bygyy"),  # three e for the two of the word: all marked
    ("eerie", "abbey", "yybby"), ("speed", "abbey", "bbygb"), ("allay", "llama", "ygyyb"),
    ("madam", "nymph", "ybbby"), ("kebab", "abbey", "bygyy")])
def test_wordle_feedback(guess, word, marks):
    assert wordle.feedback(guess, word) == marks == told(guess, word)


def test_wordle_patterns():
    codes = wordle.patterns(WORDS)
    assert codes.dtype == np.uint8 and codes.shape == (len(WORDS), len(WORDS))
    for row, guess in zip(codes, WORDS):
        assert [wordle.decode(int(code)) for code in row] == [told(guess, word) for word in WORDS]
    assert (np.diag(codes) == wordle.WON).all() and wordle.decode(wordle.WON) == "ggggg"
    assert len({wordle.decode(code) for code in range(243)}) == 243


def test_wordle_example_game():
    guesses = iter(["solar\n", "s l a t e\n"])
    prompts = []
    found = wordle.play(lambda texts: prompts.extend(texts) or [next(guesses)], ["slate", "solar"], 1,
                        seed=seed_with(0, 2, 1))
    assert prompts == ["Wordle:\n", "Wordle:\ns o l a r\ng b y y b\n"]
    assert found["return"] == -1 and found["won"] == 1 and found["invalid"] == 0


def seed_with(index, size, games):
    """A seed whose hidden words are all the word of that index."""
    return next(seed for seed in range(1000) if (np.random.default_rng(seed).integers(size, size=games) == index).all())


def test_wordle_normalised():
    assert [wordle.normalised(raw) for raw in (-6, -4.12, -1.94)] == pytest.approx([0, 50, 100])
    assert wordle.normalised(-5.06) == pytest.approx(25)
    assert wordle.normalised(-2.0354) == pytest.approx(97.7, abs=0.15)  # as published: ILQL, BC
    assert wordle.normalised(-2.8142) == pytest.approx(79.9, abs=0.15)


# --- Wordle: play -----------------------------------------------------------------------------------------------------


def test_wordle_policy_that_knows_the_word():
    hidden = np.random.default_rng(7).integers(len(WORDS), size=200)
    found = wordle.play(lambda prompts: [WORDS[word] for word in hidden], WORDS, 200, seed=7)
    assert found == {"return": 0, "error": 0, "won": 1, "invalid": 0}
    assert set(hidden) == set(range(len(WORDS)))


@pytest.mark.parametrize("guess,shown", [("zzzzz\n", "z z z z z\n"), ("SLATE", "S L A T E\n"), ("", "\n"),
                                         ("s l a", "s l a\n"), ("slates", "s l a t e s\n")])
def test_wordle_guesses_that_are_not_on_the_list(guess, shown):
    prompts = []
    found = wordle.play(lambda texts: prompts.append(list(texts)) or [guess] * len(texts), WORDS, 3)
    assert found == {"return": -6, "error": 0, "won": 0, "invalid": 1}
    assert prompts == [["Wordle:\n" + (shown + "\n") * number] * 3 for number in range(6)]


def test_wordle_wins_at_the_last_try():
    """Five times wrong, once with spaces and once not, once not on the list; the sixth guess wins."""
    guesses = iter(["nymph", "n y m p h", "zzzzz", "solar\n", "nymph", "s l a t e\n"])
    found = wordle.play(lambda prompts: [next(guesses)], WORDS, 1, seed=seed_with(0, len(WORDS), 1))
    assert found["return"] == -5 and found["won"] == 1 and found["invalid"] == pytest.approx(1 / 6)


def test_wordle_statistics():
    """One guess for all games: those with that word win, and the others go on without them."""
    hidden = np.random.default_rng(3).integers(len(WORDS), size=400)
    sizes, won = [], (hidden == 0).sum()
    found = wordle.play(lambda prompts: sizes.append(len(prompts)) or ["slate"] * len(prompts), WORDS, 400, seed=3)
    returns = np.where(hidden == 0, 0, -6)
    assert found["return"] == pytest.approx(returns.mean()) and found["won"] == pytest.approx(won / 400)
    assert found["error"] == pytest.approx(returns.std(ddof=1) / 20) and sizes == [400] + [400 - won] * 5 and won > 5


def test_wordle_play_shows_each_game_its_own_feedback():
    hidden = np.random.default_rng(5).integers(len(WORDS), size=50)
    prompts = []
    wordle.play(lambda texts: prompts.append(list(texts)) or ["nymph" if len(prompts) > 1 else "toast"] * len(texts),
                WORDS, 50, seed=5)
    marks = [told("toast", WORDS[word]) for word in hidden if WORDS[word] != "toast"]
    assert prompts[1] == ["Wordle:\nt o a s t\n" + " ".join(mark) + "\n" for mark in marks]


def test_wordle_consistent():
    seen = "Wordle:\ns o l a r\ng b y y b\n"
    outputs = ["slate", "s l a t e\n", "solar", "nymph", "slat", "Slate"]
    found = wordle.consistent(prompts=[seen] * 6 + ["Wordle:\n"] * 2 + [seen + "z z z z z\n\n"] * 2,
                              outputs=outputs + ["nymph", "12345"] + ["slate", "nymph"], samples=None)
    assert found == {"well_formed": [1, 1, 1, 1, 0, 0, 1, 0, 1, 1], "consistent": [1, 1, 0, 0, 0, 0, 1, 0, 1, 0]}
    later = seen + "s t a l l\ng y g y y\n"  # "shale" fits the first line only
    assert wordle.consistent([later] * 2, ["slate", "shale"])["consistent"] == [1, 0]


# --- Wordle: data -----------------------------------------------------------------------------------------------------


def parsed(row):
    """(guesses, feedbacks) of a row, spaces dropped."""
    assert all(text.endswith("\n") and text.count("\n") == 1 for text in row["turns"])
    texts = [text.removesuffix("\n") for text in row["turns"]]
    assert texts[0] == "Wordle:" and all(text == " ".join(text.replace(" ", "")) for text in texts[1:])
    return [[text.replace(" ", "") for text in texts[start::2]] for start in (1, 2)]


@pytest.mark.parametrize("prob_smart", [0.0, 1 / 3, 1.0])
def test_wordle_rows(prob_smart):
    """Each row can be a game: some word explains all feedback, rewards and length follow from it. What a row with only
    smart guesses may guess is found by plain filtering."""
    rows = wordle.data(WORDS, 300, seed=2, prob_smart=prob_smart)
    assert len(rows) == 300
    lengths, smart, asked = Counter(), 0, 0
    for row in rows:
        guesses, seen = parsed(row)
        won = row["reward"][-1] == 0
        assert len(row["turns"]) % 2 == 0 and len(seen) == len(guesses) - 1 and len(guesses) <= 6
        assert row["reward"] == [-1.0] * (len(guesses) - 1) + [0.0 if won else -1.0] and (won or len(guesses) == 6)
        possible = list(WORDS)
        for guess, marks in zip(guesses, [*seen, None]):
            asked, smart = asked + 1, smart + (guess in possible)
            assert prob_smart < 1 or guess in possible
            assert marks != "ggggg"
            possible = [word for word in possible if marks is None or told(guess, word) == marks]
        assert possible and (not won or guesses[-1] in possible)
        lengths[len(guesses)] += 1
    if prob_smart == 1:
        assert lengths[6] < 10 and lengths[1] < 40
    else:
        assert smart < asked
        assert prob_smart > 0 or lengths[6] > 200


def test_wordle_data_recipe():
    """Shares and returns against plain-Python games by the same recipe, within five standard errors of both."""
    rng, returns = np.random.default_rng(0), []
    for _ in range(3000):
        word, possible, paid = WORDS[rng.integers(len(WORDS))], list(WORDS), 0
        for _ in range(6):
            pool = possible if rng.random() < 1 / 3 else WORDS
            guess = pool[rng.integers(len(pool))]
            if guess == word:
                break
            paid -= 1
            possible = [other for other in possible if told(guess, other) == told(guess, word)]
        returns.append(paid)
    rows = wordle.data(WORDS, 6000, seed=1)
    found = [sum(row["reward"]) for row in rows]
    assert np.mean(found) == pytest.approx(np.mean(returns), abs=5 * np.std(returns) * math.sqrt(1 / 3000 + 1 / 6000))
    assert np.std(found) == pytest.approx(np.std(returns), rel=0.06)
    firsts = Counter(row["turns"][1] for row in rows)
    assert set(firsts) == {" ".join(word) + "\n" for word in WORDS} and min(firsts.values()) > 170
    wins = Counter(row["turns"][-1] for row in rows if row["reward"][-1] == 0)
    assert len(wins) == len(WORDS) and min(wins.values()) > 120
    assert rows == wordle.data(WORDS, 6000, seed=1) != wordle.data(WORDS, 6000, seed=2)


def test_wordle_word_lists(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(WORDS))
    assert wordle.load_words(str(path)) == WORDS
    for text in ("slate\nslate\n", "slates\n", "Slate\n", "sl4te\n", "", "späte\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="5 small letters"):
            wordle.load_words(str(path))


# --- command lines ----------------------------------------------------------------------------------------------------


def rows_of(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_data_and_prompts_commands(tmp_path, capsys):
    out, words = tmp_path / "out.jsonl", tmp_path / "words.txt"
    words.write_text("\n".join(WORDS) + "\n")
    maze.main(["data", str(out), "--games", "30", "--seed", "5"])
    rows = rows_of(out)
    assert rows == maze.data(30, 5)
    said = capsys.readouterr().out
    assert f"30 games, {sum(len(row['reward']) for row in rows)} actions; success " in said
    assert f"success {sum(len(row['turns']) % 2 == 0 for row in rows) / 30:.3f}, length" in said
    assert f"return {np.mean([sum(row['reward']) for row in rows]):.1f}\n" in said
    assert "from all starts: return -" in said
    maze.main(["prompts", str(out)])
    assert rows_of(out) == [{"prompt": text} for text in maze.starts()]
    wordle.main(["data", str(out), "--words", str(words), "--games", "30", "--seed", "5"])
    rows = rows_of(out)
    assert rows == wordle.data(WORDS, 30, 5)
    returns = [sum(row["reward"]) for row in rows]
    assert f"return {np.mean(returns):.3f} (standard deviation {np.std(returns):.3f})" in capsys.readouterr().out
    wordle.main(["prompts", str(out)])
    assert rows_of(out) == [{"prompt": "Wordle:\n"}]
    with pytest.raises(SystemExit):
        wordle.main(["data", str(out)])


@pytest.mark.parametrize("words, line", [
    (["wordle.py", "data", "out", "--words", "none.txt"], "wordle.py: error: .*none.txt"),
    (["wordle.py", "data", "out", "--words", "wrong.txt"], "wordle.py: error: wrong.txt: not distinct words of 5 "),
    (["maze.py", "prompts", "no/where"], "maze.py: error: .*no/where"),
    (["maze.py", "play", "none"], "maze.py: error: --model .*none")])
def test_mistakes_on_the_command_line_are_one_line(words, line, tmp_path):
    (tmp_path / "wrong.txt").write_text("slates\n")
    done = run_forked(f"{ROOT}/examples/{words[0]}", *words[1:], cwd=tmp_path)
    assert done.returncode == 2 and re.fullmatch(f"{line}.*\n", done.stderr), done.stderr


def fake_ilql(monkeypatch, answer):
    """An ilql module that answers by a function of a prompt and beta, and the list of its calls."""
    calls = []

    def sample(model, tokenizer, prompts, **options):
        assert (model, tokenizer) == ("model of folder", "tokenizer")
        calls.append({**options, "prompts": len(prompts)})
        return [answer(prompt, options["beta"]) for prompt in prompts]

    monkeypatch.setitem(sys.modules, "ilql", SimpleNamespace(load=lambda folder: (f"model of {folder}", "tokenizer"),
                                                             sample=sample))
    return calls


def test_maze_play_command(monkeypatch, capsys):
    calls = fake_ilql(monkeypatch, lambda prompt, beta: best_actions(WHERE[prompt])[0].strip() if beta else "move up")
    maze.main(["play", "folder", "--beta", "0", "16", "--rollouts", "2", "--temperature", "0.5", "--seed", "3"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].startswith("beta 0: return -101.00 +- 0.00, normalised 0.0; from 1,1 -101.0, from 1,5 -101.0")
    assert said[1].startswith("beta 16: return -6.84 +- 0.00, normalised 100.0; from 1,1 -11.0")
    assert said[1].endswith("arrived 1.000, illegal 0.0000")
    assert len(calls) == 112 and len({call.pop("seed") for call in calls[:100]}) == 100
    assert calls[0] == {"prompts": 50, "beta": 0, "temperature": 0.5, "max_new_tokens": 8, "stop_sequences": ["\n"]}


def test_wordle_play_command(monkeypatch, capsys, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("slate\n")
    calls = fake_ilql(monkeypatch, lambda prompt, beta: "s l a t e" if beta else "nope")
    wordle.main(["play", "folder", "--words", str(words), "--beta", "0", "32", "--games", "10"])
    assert capsys.readouterr().out.splitlines() == [
        "beta 0: return -6.000 +- 0.000, normalised 0.0; won 0.000, invalid 1.0000",
        "beta 32: return 0.000 +- 0.000, normalised 144.5; won 1.000, invalid 0.0000"]
    assert len(calls) == 7 and len({call.pop("seed") for call in calls[:6]}) == 6
    assert calls[0] == {"prompts": 10, "beta": 0, "temperature": 1.0, "max_new_tokens": 12, "stop_sequences": ["\n"]}
