"""A maze in words, for offline RL: LMRL-Gym's fully observed "double_t_maze", rebuilt from its rules, data and all.

    python examples/maze.py data rows.jsonl --games 1200 --seed 1           # games for sft.py and ilql.py
    python examples/maze.py prompts starts.jsonl                            # the 25 starts, as evaluation prompts
    python examples/maze.py play runs/maze/model --beta 0 16 --rollouts 32  # what a model of ilql.py or sft.py earns

A text tells the goal, the position and the walls beside it; the answer is one of four moves. Each costs 1, the one that
arrives nothing, and any other text 4 (LMRL-Gym, arXiv 2311.18232, its appendix E.1 and code). The data are wanderings
within one of three parts of the maze. Only in the part with the goal do they ever arrive: cloning them is poor, and
what pays is to put together paths that no game took. LMRL-Gym's own games and what made them could not be had; `data`
says what was chosen here. Compare raw returns, and name the other data and model beside them.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.cli import UserError, leave  # noqa: E402

LAYOUT = """
#############
#.....#.....#
###.#####.###
###.#####.###
###.#####.###
###.......###
######.######
######.######
######G######
#############
""".split()
MOVES = {"move left": (0, -1), "move right": (0, 1), "move up": (-1, 0), "move down": (1, 0)}  # row, column
FREE = {(row, column) for row, line in enumerate(LAYOUT) for column, mark in enumerate(line) if mark != "#"}
GOAL = next((row, line.index("G")) for row, line in enumerate(LAYOUT) if "G" in line)
STARTS = sorted(FREE - {GOAL})
FAR = [(1, 1), (1, 5), (1, 7), (1, 11)]  # the ends of the two bars: 12 moves
PARTS = {"left": 5 / 12, "right": 5 / 12, "goal": 1 / 6}  # how often the data's games start in each part
MAX_STEPS = 100


def target(cell: tuple[int, int], move: str) -> tuple[int, int]:
    """The cell that a move leads to: the same one where a wall is in the way."""
    beside = (cell[0] + MOVES[move][0], cell[1] + MOVES[move][1])
    return beside if beside in FREE else cell


def step(cell: tuple[int, int], text: str) -> tuple[tuple[int, int], float, bool]:
    """(cell after it, reward, whether that is the goal) of an action text, with or without its newline. What is not
    exactly a move stays, and costs 4."""
    move = text.removesuffix("\n")
    if move not in MOVES:
        return cell, -4.0, False
    cell = target(cell, move)
    return (cell, 0.0, True) if cell == GOAL else (cell, -1.0, False)


def observe(cell: tuple[int, int]) -> str:
    """The text of a cell, with its newline. The digits of a number stand apart: column 10 is "1 0"."""
    row, column, goal_row, goal_column = (" ".join(str(number)) for number in (*cell, *GOAL))
    sides = {"move right": "to your right", "move left": "to your left", "move up": "above you",
             "move down": "below you"}
    walls = [side for move, side in sides.items() if target(cell, move) == cell]
    near = (f"There are walls {', '.join(walls)}." if len(walls) > 1 else
            f"There is a wall {walls[0]}." if walls else "There are no walls near you.")
    return (f"The goal is at position {goal_row}, {goal_column}. "
            f"Your current position is at position {row}, {column}. {near}\n")


def distances() -> dict[tuple[int, int], int]:
    """Moves from each free cell to the goal, by breadth-first search."""
    found, queue = {GOAL: 0}, [GOAL]
    for cell in queue:
        for row, column in MOVES.values():
            beside = (cell[0] + row, cell[1] + column)
            if beside in FREE and beside not in found:
                found[beside] = found[cell] + 1
                queue.append(beside)
    return found


DISTANCE = distances()
CELL = {observe(cell): cell for cell in FREE}
BEST = {cell: [move for move in MOVES if DISTANCE[target(cell, move)] < DISTANCE[cell]] for cell in STARTS}


def starts() -> list[str]:
    """The observations of the 25 cells that are not the goal."""
    return [observe(cell) for cell in STARTS]


def normalised(raw: float) -> float:
    """LMRL-Gym's score: 0 for a return of -101, 50 for -83, its data's, 100 for -6.84, the best. Its published scores
    do not all follow from its published returns: compare returns."""
    worst, average, best = -101.0, -83.0, -6.84
    if raw < average:
        return 50 * (raw - worst) / (average - worst)
    return 50 + 50 * (raw - average) / (best - average)


# --- data and policies ----------------------------------------------------------------------------------------------


def part(cell: tuple[int, int]) -> str:
    """Which part of the maze a cell is in: the left T, the right T, or the corridor with the goal's dead end."""
    return "goal" if cell[0] >= 5 else "left" if cell[1] < 6 else "right"


def data(games: int = 1200, seed: int = 1, best_share: float = 0.15) -> list[dict]:
    """Games as rows {"turns": [observation, action, observation, ...], "reward": [one number per action]}.

    A game starts in a part of the maze, the goal's less often than the others, so that 0.11 of the games arrive, as in
    LMRL-Gym's Table 1; then in any cell of it. A move is the shortest path's with probability `best_share`, else one of
    four, all alike. A game ends at the goal, when a move has left its part, or after 100 moves. Its row ends with the
    last action if that arrived, otherwise with the observation after it, for there it would have gone on.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(games):
        own = rng.choice(list(PARTS), p=list(PARTS.values()))
        cells = [cell for cell in STARTS if part(cell) == own]
        cell = cells[rng.integers(len(cells))]
        turns, rewards, done = [observe(cell)], [], False
        while not done and part(cell) == own and len(rewards) < MAX_STEPS:
            moves = BEST[cell] if rng.random() < best_share else list(MOVES)
            move = moves[rng.integers(len(moves))]
            cell, reward, done = step(cell, move)
            turns.append(f"{move}\n")
            rewards.append(reward)
            if not done:
                turns.append(observe(cell))
        rows.append({"turns": turns, "reward": rewards})
    return rows


def tabular_clone(rows: list[dict], seed: int = 1):
    """The policy that answers an observation with an action drawn as often as the rows have it there (any of the four
    where they have none): what they earn in the whole maze."""
    counts = Counter((turn, action) for row in rows for turn, action in zip(row["turns"][::2], row["turns"][1::2]))
    moves = [f"{move}\n" for move in MOVES]
    shares = {}
    for text in CELL:
        found = np.array([counts[text, move] for move in moves])
        shares[text] = np.cumsum(found / found.sum() if found.sum() else np.full(len(moves), 1 / len(moves)))
    rng = np.random.default_rng(seed)

    def policy(prompts: list[str]) -> list[str]:
        draws = rng.random(len(prompts))
        return [moves[min(np.searchsorted(shares[text], draw, side="right"), len(moves) - 1)]
                for text, draw in zip(prompts, draws)]

    return policy


# --- evaluation -----------------------------------------------------------------------------------------------------


def play(policy, rollouts: int = 32, max_steps: int = MAX_STEPS) -> dict:
    """`rollouts` games from each of the 25 starts, all side by side: policy(observations) -> actions.

    Returns `return`, the mean over starts of their mean returns, its standard error over rollouts (the starts are
    fixed), the means at the four far ends, the share of texts that were no move and of games that arrived. A game that
    does not arrive in `max_steps` pays 1 more, so legal ones cost 101.
    """
    cells = [cell for cell in STARTS for _ in range(rollouts)]
    returns, running, illegal, texts = np.zeros(len(cells)), list(range(len(cells))), 0, 0
    for _ in range(max_steps):
        if not running:
            break
        actions = policy([observe(cells[game]) for game in running])
        left = []
        for game, action in zip(running, actions, strict=True):
            illegal, texts = illegal + (action.removesuffix("\n") not in MOVES), texts + 1
            cells[game], reward, done = step(cells[game], action)
            returns[game] += reward
            if not done:
                left.append(game)
        running = left
    returns[running] -= 1
    returns = returns.reshape(len(STARTS), rollouts)
    means = returns.mean(1)
    spread = returns.var(1, ddof=1).sum() ** 0.5 / rollouts**0.5 / len(STARTS) if rollouts > 1 else float("nan")
    return {"return": float(means.mean()), "error": float(spread),
            **{f"from {row},{column}": float(means[STARTS.index((row, column))]) for row, column in FAR},
            "illegal": illegal / texts, "arrived": 1 - len(running) / len(cells)}


def accuracy(prompts: list[str], outputs: list[str], **_) -> dict[str, list[float]]:
    """For `--metric examples/maze.py:accuracy`, with prompts that end with an observation: `optimal`, whether the
    output is a move on a shortest path, and `illegal`, whether it is no move."""
    cells = [CELL[prompt.splitlines()[-1] + "\n"] for prompt in prompts]
    moves = [output.removesuffix("\n") for output in outputs]
    return {"optimal": [float(move in BEST.get(cell, [])) for cell, move in zip(cells, moves)],
            "illegal": [float(move not in MOVES) for move in moves]}


def play_model(folder: str, betas: list[float], rollouts: int, temperature: float, seed: int) -> list[dict]:
    """Play with a model folder of ilql.py, or with beta 0 of sft.py, once for each beta; print a line for each."""
    import ilql

    model, tokenizer = ilql.load(folder)
    results = []
    for beta in betas:
        seeds = np.random.default_rng(seed)

        def policy(prompts):
            return ilql.sample(model, tokenizer, prompts, beta=beta, temperature=temperature, max_new_tokens=8,
                               stop_sequences=["\n"], seed=int(seeds.integers(2**31)))

        results.append({"beta": beta, **play(policy, rollouts)})
        print(line(results[-1]), flush=True)
    return results


def line(result: dict) -> str:
    """A result of `play`, in words."""
    beta = f"beta {result['beta']:g}: " if "beta" in result else ""
    return (f"{beta}return {result['return']:.2f} +- {result['error']:.2f}, "
            f"normalised {normalised(result['return']):.1f}; "
            + ", ".join(f"{key} {value:.1f}" for key, value in result.items() if key.startswith("from "))
            + f"; arrived {result['arrived']:.3f}, illegal {result['illegal']:.4f}")


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
    command.add_argument("--games", type=int, default=1200)
    command.add_argument("--seed", type=int, default=1)
    command = commands.add_parser("prompts", help="write the 25 starts")
    command.add_argument("out")
    command = commands.add_parser("play", help="evaluate a model folder")
    command.add_argument("model")
    command.add_argument("--beta", type=float, nargs="+", default=[16.0], help="weight of Q; 0: the cloned policy")
    command.add_argument("--rollouts", type=int, default=32, help="games from each start")
    command.add_argument("--temperature", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if args.command == "data":
        rows = data(args.games, args.seed)
        write(rows, args.out)
        lengths = [len(row["reward"]) for row in rows]
        print(f"{len(rows)} games, {sum(lengths)} actions; success "
              f"{np.mean([len(row['turns']) % 2 == 0 for row in rows]):.3f}, length {np.mean(lengths):.1f} (standard "
              f"deviation {np.std(lengths):.1f}), return {np.mean([sum(row['reward']) for row in rows]):.1f}")
        print(f"the data's policy from all starts: {line(play(tabular_clone(rows, args.seed)))}")
    elif args.command == "prompts":
        write([{"prompt": text} for text in starts()], args.out)
    else:
        play_model(args.model, args.beta, args.rollouts, args.temperature, args.seed)


if __name__ == "__main__":
    try:
        main()
    except (OSError, UserError) as error:
        leave(2, f"error: {error}")
