"""Files of benchmarks that are refused: prompts, findings, drawn folders, networks that look."""

import json
from pathlib import Path

from jax_distill.evaluation import judged
from jax_distill.evaluation.benchmarks import dpg, drawn, generation, geneval, prompts, runners

CLAUSE = {"class": "owl", "count": 1}
TABLE = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"


def ask_all(root: Path, ask) -> None:
    def write(name: str, text: str) -> Path:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def asks(*include) -> Path:
        return write("g.jsonl", json.dumps({"tag": "a", "include": include, "prompt": "an owl"}))

    ask(prompts.read_geneval, write("empty.jsonl", ""))
    ask(prompts.read_geneval, asks({"class": "owl"}))
    ask(prompts.read_geneval, asks(CLAUSE | {"position": ["above", 1]}, CLAUSE))
    ask(prompts.read_dpg, write("d.csv", TABLE.replace("tuple,", "")))
    ask(prompts.read_dpg, write("d.csv", f"{TABLE}../x,a cup,1,0,entity - whole (cup),Is there?\n"))

    asked = drawn.read_asked("geneval", prompts.BUNDLED / "geneval.jsonl")

    def found(picture: str, *objects) -> None:
        text = json.dumps({"picture": picture, "objects": objects})
        ask(geneval.read_detections, write("found.jsonl", text), asked.prompts)

    found("00012/samples/0000.png")
    found("00000/samples/0000.png", {"class": "owl", "box": [9, 0, 3, 4], "score": 1})
    ask(geneval.read_detections, write("found.jsonl", ""), asked.prompts)
    dense = prompts.read_dpg(prompts.BUNDLED / "dpg.csv")
    answers = {str(question.number): "perhaps" for question in dense[0].questions}
    line = {"item_id": dense[0].item, "picture": 0, "answers": answers}
    ask(dpg.read_answers, write("answers.jsonl", json.dumps(line)), dense)

    ask(drawn.read_drawn, root / "nowhere")
    folder, facts = root / "begun", {"benchmark": "geneval", "file": "prompts.jsonl", "steps": 2}
    folder.mkdir()
    generation._begin(folder, asked, facts, {})
    ask(generation._begin, folder, asked, {**facts, "steps": 4}, {})
    facts |= {"pictures": 4, "kind": "teacher", "seed": 0, "prompts": "", "config": {}}
    for digest in ("of another text", drawn.digest(asked.text)):
        (folder / "drawing.json").write_text(json.dumps(facts | {"prompts": digest}))
        ask(drawn.read_drawn, folder)
    ask(generation._begin, write("other/thesis.tex", "x").parent, asked, facts, {})

    network = write("network/config.json", "{}").parent
    ask(runners.processor, network)
    ask(runners.run_onnx, write("network/model.onnx", "x"), ["pixel_values"])
    results = {"benchmark": "geneval", "level": "high"}
    ask(judged.read_table, write("results.json", json.dumps(results)))
