"""Solvers for grids: islands, paths, small sudokus. See `traces_base.py` for what they return.

Cells are written row.column, counted from 1.
"""

from data_scripts.reasoning.traces_arithmetic import find
from data_scripts.reasoning.traces_base import NoProcedure, Step, Working

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def _cell(cell):
    return f"{cell[0] + 1}.{cell[1] + 1}"


def _beside(cell, cells):
    return [(name, near) for name, (r, c) in MOVES.items() if (near := (cell[0] + r, cell[1] + c)) in cells]


def _read(lines):
    return [line.split() for line in lines.split("\n")]


def largest_island(problem):
    grid = _read(find(r"matrix grid:\n([01 \n]+)\n\n", problem)[0])
    land = {(r, c) for r, row in enumerate(grid) for c, value in enumerate(row) if value == "1"}
    if not land:
        return Working("find the largest island", [Step("there is no 1")], "0")
    steps, sizes, left = [], [], set(land)
    for r, row in enumerate(grid):
        columns = [str(c + 1) for c, value in enumerate(row) if value == "1"]
        steps.append(Step(f"row {r + 1}: {' '.join(columns) or 'none'}"))
    for start in sorted(land):
        if start not in left:
            continue
        island = [start]
        left.discard(start)
        for cell in island:
            for _, near in _beside(cell, left):
                left.discard(near)
                island.append(near)
        sizes.append(len(island))
        counted = ", ".join(f"{place} {_cell(cell)}" for place, cell in enumerate(island, 1))
        last = island[-1]
        slip = (f"island of {len(island) - 1}", f"{_cell(last)} touches it too") if len(island) > 1 else ("", "")
        steps.append(Step(f"island: {counted}; {len(island)} cells", *slip))
    if len(sizes) > 1:
        steps.append(Step(f"largest of {' '.join(map(str, sizes))}: {max(sizes)}"))
    return Working("find the largest island", steps, str(max(sizes)))


def shortest_path(problem):
    grid = problem.metadata["matrix"]
    cells = {(r, c): value for r, row in enumerate(grid) for c, value in enumerate(row) if value != "X"}
    start, goal = (next(cell for cell, value in cells.items() if value == mark) for mark in "*#")
    steps = [Step(f"start {_cell(start)}, goal {_cell(goal)}")]
    came, wave, distance = {start: None}, [start], 0
    while wave and goal not in came:
        after = []
        for cell in wave:
            for name, near in _beside(cell, cells):
                if near not in came:
                    came[near] = (name, cell)
                    after.append(near)
        distance, wave = distance + 1, after
        steps.append(Step(f"{distance}: {' '.join(map(_cell, wave)) or 'no new cell'}"))
    if goal not in came:
        steps.append(Step("the goal is not reached: infeasible"))
        return Working("find the shortest path", steps, "infeasible")
    moves, cell = [], goal
    while came[cell]:
        name, before = came[cell]
        moves.append((name, before, cell))
        cell = before
    moves.reverse()
    opposite = {"up": "down", "down": "up", "left": "right", "right": "left"}
    for number, (name, before, after) in enumerate(moves):
        turned = opposite[name]
        slip = ("", "") if number else (f"{_cell(before)} {turned} to {_cell(after)}", f"{turned} leads away")
        steps.append(Step(f"{_cell(before)} {name} to {_cell(after)}", *slip))
    return Working("find the shortest path", steps, " ".join(name for name, _, _ in moves))


def mini_sudoku(problem):
    grid = _read(find(r"Mini Sudoku puzzle:\n([1-4_ \n]+?)\nFormat", problem)[0])
    empty, steps = [(r, c) for r in range(4) for c in range(4) if grid[r][c] == "_"], []
    while empty:
        for r, c in empty:
            row = {grid[r][k] for k in range(4)}
            column = {grid[k][c] for k in range(4)}
            box = {grid[r // 2 * 2 + i][c // 2 * 2 + j] for i in range(2) for j in range(2)}
            may = [value for value in "1234" if value not in row | column | box]
            if len(may) == 1:
                break
        else:
            raise NoProcedure("no cell that only one number fits")
        def said(values):
            return " ".join(sorted(values - {"_"})) or "none"
        wrong = next((value for value in "1234" if value in row and value != may[0]), None)
        slip = (f"{_cell((r, c))} is {wrong}", f"row {r + 1} has {wrong} already") if wrong else ("", "")
        seen = f"row {said(row)}, column {said(column)}, box {said(box)}"
        steps.append(Step(f"{_cell((r, c))}: {seen}; so {may[0]}", *slip))
        grid[r][c] = may[0]
        empty.remove((r, c))
    return Working("fill the grid", steps, "\n".join(" ".join(row) for row in grid))


SOLVERS = {"largest_island": largest_island, "shortest_path": shortest_path, "mini_sudoku": mini_sudoku}
