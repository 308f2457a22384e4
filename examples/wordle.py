"""Wordle in letters, for offline RL: LMRL-Gym's version, rebuilt from its rules, with its recipe for the data.

    python examples/wordle.py data rows.jsonl --words words.txt --games 100000 --seed 1    # games to train on
    python examples/wordle.py prompts header.jsonl                                         # how all games begin
    python examples/wordle.py play runs/wordle/model --words words.txt --beta 0 32 --games 4096

Six guesses at a hidden word of five letters, all from one list, a file with a word a line (LMRL-Gym's
wordle_official_400.txt has 431). Letters are written apart:

    Wordle:
    s o l a r
    g b y y b
    s l a t e

g: the right letter, y: it is elsewhere in the word, b: it is not in it. Unlike in the newspapers' game repeated letters
are not counted: a letter guessed twice is y twice though the word has it once. The guess that wins pays 0, each other
one -1; one that is not on the list pays -1 too and gets an empty line (LMRL-Gym, arXiv 2311.18232, its appendices C.3
and E.4, and code, whose training scripts take 10 for it instead).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.cli import UserError, leave  # noqa: E402

HEADER = "Wordle:\n"
TRIES, LETTERS = 6, 5
WON = 3**LETTERS - 1  # the pattern ggggg, see `patterns`


def load_words(path: str) -> list[str]:
    """The words of a file, one a line. Raises UserError for one that is not five small letters, or stands twice."""
    words = Path(path).read_text().split()
    wrong = [word for at, word in enumerate(words) if not well_formed(word) or word in words[:at]]
    if wrong or not words:
        raise UserError(f"{path}: not distinct words of {LETTERS} small letters: {wrong[:1] or 'empty'}")
    return words


def well_formed(guess: str) -> bool:
    """Whether a text is five small letters."""
    return len(guess) == LETTERS and guess.isascii() and guess.isalpha() and guess.islower()


def feedback(guess: str, word: str) -> str:
    """Five letters of g, y and b. Repeated letters are not counted."""
    return "".join("g" if letter == right else "y" if letter in word else "b" for letter, right in zip(guess, word))


def line(letters: str) -> str:
    """A guess or a feedback as its line in the text."""
    return " ".join(letters) + "\n"


def normalised(raw: float) -> float:
    """LMRL-Gym's score: 0 for a return of -6, 50 for -4.12, its data's, 100 for -1.94, that of guesses picked for the
    information they give."""
    worst, average, best = -6.0, -4.12, -1.94
    if raw < average:
        return 50 * (raw - worst) / (average - worst)
    return 50 + 50 * (raw - average) / (best - average)


# --- data -----------------------------------------------------------------------------------------------------------


def patterns(words: list[str]) -> np.ndarray:
    """Feedback codes [guess, word], uint8: five digits of base 3, b 0, y 1 and g 2, the first letter's highest."""
    letters = np.array([list(word.encode()) for word in words])
    codes = np.zeros((len(words), len(words)), dtype=np.uint8)
    for place in range(LETTERS):
        guessed = letters[:, place, None]
        present = (guessed[:, :, None] == letters[None]).any(-1)
        codes = codes * 3 + present + (guessed == letters[None, :, place])
    return codes


def decode(code: int) -> str:
    """The feedback of a code."""
    return "".join("byg"[code // 3**place % 3] for place in reversed(range(LETTERS)))


def data(words: list[str], games: int, seed: int = 1, prob_smart: float = 1 / 3) -> list[dict]:
    """Games as rows {"turns": [header, guess, feedback, guess, ...], "reward": [one number per guess]}: the hidden word
    is drawn from all, and so is a guess, but with probability `prob_smart` from those that all feedback so far allows.
    A row ends with the guess that wins or with the sixth."""
    rng = np.random.default_rng(seed)
    codes = patterns(words)
    guess_lines, feedback_lines = [line(word) for word in words], [line(decode(code)) for code in range(WON + 1)]
    hidden = rng.integers(len(words), size=games).tolist()
    smart = (rng.random((games, TRIES)) < prob_smart).tolist()
    anywhere = rng.integers(len(words), size=(games, TRIES)).tolist()
    draws = rng.random((games, TRIES)).tolist()
    rows = []
    for word, smarts, guesses, shares in zip(hidden, smart, anywhere, draws):
        turns, possible = [HEADER], np.ones(len(words), dtype=bool)
        for guess, think, share in zip(guesses, smarts, shares):
            if think:
                allowed = possible.nonzero()[0]
                guess = int(allowed[int(share * len(allowed))])
            code = codes[guess, word]
            turns += [guess_lines[guess], feedback_lines[code]]
            if code == WON:
                break
            possible &= codes[guess] == code
        tried = len(turns) // 2
        rows.append({"turns": turns[:-1], "reward": [-1.0] * (tried - 1) + [0.0 if code == WON else -1.0]})
    return rows


# --- evaluation -----------------------------------------------------------------------------------------------------


def play(policy, words: list[str], games: int = 4096, seed: int = 1) -> dict:
    """Games with hidden words drawn from the list, all side by side: policy(games so far) -> guesses, of which spaces
    and a last newline are dropped. Returns the mean `return`, its standard error, the share of games won, and the
    share of guesses that are not on the list."""
    hidden = np.random.default_rng(seed).integers(len(words), size=games)
    known = set(words)
    texts, returns, running = [HEADER] * games, np.zeros(games), list(range(games))
    guessed = invalid = 0
    for _ in range(TRIES):
        if not running:
            break
        left = []
        for game, text in zip(running, policy([texts[game] for game in running]), strict=True):
            guess, word = text.removesuffix("\n").replace(" ", ""), words[hidden[game]]
            guessed, invalid = guessed + 1, invalid + (guess not in known)
            if guess == word:
                continue
            returns[game] -= 1
            texts[game] += line(guess) + line(feedback(guess, word) if guess in known else "")
            left.append(game)
        running = left
    return {"return": float(returns.mean()), "error": float(returns.std(ddof=1) / games**0.5) if games > 1 else
            float("nan"), "won": 1 - len(running) / games, "invalid": invalid / guessed}


def consistent(prompts: list[str], outputs: list[str], **_) -> dict[str, list[float]]:
    """For `--metric examples/wordle.py:consistent`, with prompts that are games so far: `well_formed`, whether the
    output is five small letters, and `consistent`, whether as the hidden word it would have got the feedback seen."""
    shapes, fits = [], []
    for prompt, output in zip(prompts, outputs):
        guess = output.removesuffix("\n").replace(" ", "")
        lines = [text.replace(" ", "") for text in prompt.splitlines()[1:]]
        shapes.append(float(well_formed(guess)))
        fits.append(float(well_formed(guess) and all(feedback(before, guess) == seen
                                                     for before, seen in zip(lines[::2], lines[1::2]) if seen)))
    return {"well_formed": shapes, "consistent": fits}


def play_model(folder: str, words: list[str], betas: list[float], games: int, temperature: float,
               seed: int) -> list[dict]:
    """Play with a model folder of ilql.py, or with beta 0 of sft.py, once for each beta; print a line for each."""
    import ilql

    model, tokenizer = ilql.load(folder)
    results = []
    for beta in betas:
        seeds = np.random.default_rng(seed)

        def policy(prompts):
            return ilql.sample(model, tokenizer, prompts, beta=beta, temperature=temperature, max_new_tokens=12,
                               stop_sequences=["\n"], seed=int(seeds.integers(2**31)))

        results.append({"beta": beta, **play(policy, words, games, seed)})
        last = results[-1]
        print(f"beta {beta:g}: return {last['return']:.3f} +- {last['error']:.3f}, "
              f"normalised {normalised(last['return']):.1f}; won {last['won']:.3f}, invalid {last['invalid']:.4f}",
              flush=True)
    return results


def write(rows: list[dict], path: str):
    """Rows as a .jsonl file."""
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main(argv: list[str] | None = None):
    """The three commands above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("data", help="write games")
    command.add_argument("out")
    command.add_argument("--words", required=True, help="file with a word a line")
    command.add_argument("--games", type=int, default=100_000)
    command.add_argument("--seed", type=int, default=1)
    command = commands.add_parser("prompts", help="write how all games begin")
    command.add_argument("out")
    command = commands.add_parser("play", help="evaluate a model folder")
    command.add_argument("model")
    command.add_argument("--words", required=True, help="file with a word a line")
    command.add_argument("--beta", type=float, nargs="+", default=[32.0], help="weight of Q; 0: the cloned policy")
    command.add_argument("--games", type=int, default=4096)
    command.add_argument("--temperature", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if args.command == "data":
        rows = data(load_words(args.words), args.games, args.seed)
        write(rows, args.out)
        returns, lengths = np.array([(sum(row["reward"]), len(row["reward"])) for row in rows]).T
        print(f"{len(rows)} games, {lengths.sum():.0f} guesses; return {returns.mean():.3f} (standard deviation "
              f"{returns.std():.3f}), success {np.mean([row['reward'][-1] == 0 for row in rows]):.3f}, length "
              f"{lengths.mean():.3f} (standard deviation {lengths.std():.3f})")
    elif args.command == "prompts":
        write([{"prompt": HEADER}], args.out)
    else:
        play_model(args.model, load_words(args.words), args.beta, args.games, args.temperature, args.seed)


if __name__ == "__main__":
    try:
        main()
    except (OSError, UserError) as error:
        leave(2, f"error: {error}")
