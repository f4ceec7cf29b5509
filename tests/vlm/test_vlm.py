"""The judge behind a server: a real HTTP server in this process that fails in every way before it answers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from command_line import UserError
from evaluation.vlm_prompts import vlm_prompts
from evaluation.vlm_suite import VLMSuite, combine, read_ratings, read_yes, with_parents
from vlm import server as vlm_server
from vlm.server import ChatServer, ServerConfig

PICTURE = np.zeros((8, 8, 3), np.uint8)


class Script(BaseHTTPRequestHandler):
    """Answers with `replies` in turn: a text, a status, "hang" or "cut"."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        reply = self.server.replies.pop(0)
        if reply == "hang":
            self.server.released.wait(5)
            return
        if isinstance(reply, int):
            self.send_error(reply)
            return
        data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if reply == "cut" else data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(vlm_server.time, "sleep", lambda seconds: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Script) as http:
        http.replies, http.asked, http.released = [], [], threading.Event()
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http
        http.released.set()
        http.shutdown()


def chat(server, **settings):
    return ChatServer(ServerConfig(f"http://127.0.0.1:{server.server_port}/v1", "judge", **settings))


def test_answers_come_through_what_may_pass_by(server):
    server.replies += [503, 429, "cut", "hang", "fine"]
    assert chat(server, timeout_s=0.5).ask("How is it?", [PICTURE, PICTURE]) == "fine"
    content = server.asked[-1]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,") and server.asked[-1]["temperature"] == 0


def test_what_will_not_pass_by_ends_in_one_line(server):
    server.replies += [404]
    with pytest.raises(UserError, match="refuses the question: 404"):
        chat(server).ask("?", [])
    server.replies += [500] * 3
    with pytest.raises(UserError, match="no answer within 900 s .500"):
        chat(server, attempts=3).ask("?", [])
    server.replies += ["hang"]
    with pytest.raises(UserError, match="no answer within 0.2 s"):
        chat(server, deadline_s=0.2).ask("?", [])
    with pytest.raises(UserError, match="--server.url"):
        ChatServer(ServerConfig())


def test_questions_count_with_what_they_presuppose(server, tmp_path):
    (tmp_path / "dpg_bench.csv").write_text(
        "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
        'a,"A red cat, asleep",,1,0,e,w,t,Is there a cat?\n'
        'a,"A red cat, asleep",,2,1,a,c,t,Is the cat red?\n'
        'a,"A red cat, asleep",,3,"1,2",a,c,t,Is the red cat asleep?\n'
    )
    prompts = vlm_prompts("dpg", tmp_path)
    assert [p.text for p in prompts] == ["A red cat, asleep"]
    yes, no = '{"answer": "yes"}', '{"answer": "no"}'
    server.replies += [yes, "No doubt: yes.", no, yes]
    suite = VLMSuite("dpg", prompts, chat(server))
    assert suite.score([PICTURE], prompts) == {"rating": [pytest.approx(1 / 3)]}
    first, again = (asked["messages"][0]["content"][-1]["text"] for asked in server.asked[1:3])
    assert again.startswith(first) and "No doubt: yes." in again and '{"answer": "yes"}' in first
    server.replies += ["maybe"] * 3
    with pytest.raises(UserError, match="doesn't answer 'Is there a cat.*in the form asked for: 'maybe'"):
        suite.score([PICTURE], prompts)
    assert with_parents({1: False, 2: True, 3: True}, {1: [], 2: [1], 3: [2]}) == pytest.approx(1 / 3)


def test_ratings_of_pictures_and_edits(server, tmp_path):
    (tmp_path / "draw.csv").write_text("Prompts,Category\nA green cup,Colors\nTwo dogs,Counting\n")
    prompts = vlm_prompts("drawbench", tmp_path / "draw.csv")
    assert [p.stratum for p in prompts] == ["Colors", "Counting"]
    server.replies += ['{"alignment": 5}', "I would say 2.", '```json\n{"alignment": 2}\n```']
    assert VLMSuite("drawbench", prompts, chat(server)).score([PICTURE] * 2, prompts) == {"rating": [1.0, 0.25]}

    Image.fromarray(PICTURE).save(tmp_path / "in.png")
    row = {"key": "k", "task_type": "color", "instruction": "make it red", "input_image": "in.png"}
    (tmp_path / "gedit.jsonl").write_text(json.dumps(row))
    edits = vlm_prompts("gedit", tmp_path / "gedit.jsonl")
    server.replies += ['{"success": 8, "preservation": 10}', '{"naturalness": 5, "cleanness": 2}']
    suite = VLMSuite("gedit", edits, chat(server))
    assert suite.score([PICTURE], edits)["rating"][0] == pytest.approx((0.8 * 0.2) ** 0.5)
    assert suite.sources(edits[0], (8, 8))[0].shape == (8, 8, 3)
    assert len(server.asked[-1]["messages"][0]["content"]) == 3

    (tmp_path / "basic_edit.json").write_text(
        json.dumps({"1": {"id": "in.png", "prompt": "add {x}", "edit_type": "add"}})
    )
    (tmp_path / "prompts.json").write_text(json.dumps({"add": "Rate {all}: <edit_prompt>"}))
    (imgedit,) = vlm_prompts("imgedit", tmp_path)
    compliance = "Brief reasoning: 3 things.\nCompliance: 5\nSeamlessness: 4\nFidelity: 3"
    server.replies += [compliance, '{"first": 5, "second": 4, "third": 3}']
    assert VLMSuite("imgedit", [imgedit], chat(server)).score([PICTURE], [imgedit])["rating"] == [0.75]
    asked = server.asked[-2]["messages"][0]["content"][-1]["text"]
    assert asked.startswith("Rate {all}: add {x} Give the three ratings in the order")
    assert asked.endswith('each NUMBER from 1 to 5: {"first": NUMBER, "second": NUMBER, "third": NUMBER}')


def test_oneig_is_read(tmp_path):
    (tmp_path / "Q_D").mkdir()
    (tmp_path / "OneIG-Bench.csv").write_text(
        "category,id,prompt_en\nAnime_Stylization,000,a\nPortrait,000,b\nGeneral_Object,000,c\n"
    )
    for stem in ("anime", "human", "object"):
        item = {"question": json.dumps({"1": "Is it?", "2": "So?"}), "dependency": {"1": [0], "2": [1]}}
        (tmp_path / f"Q_D/{stem}.json").write_text(json.dumps({"000": item}))
    prompts = vlm_prompts("oneig", tmp_path)
    assert [(p.text, p.stratum) for p in prompts] == [("a", "anime"), ("b", "human"), ("c", "object")]
    assert prompts[0].metadata["questions"][1] == {"id": 2, "text": "So?", "parents": [1]}


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match="give --prompts"):
        vlm_prompts("dpg", None)
    with pytest.raises(UserError, match="no file"):
        vlm_prompts("dpg", tmp_path)
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not in the format of drawbench"):
        vlm_prompts("drawbench", tmp_path / "x.csv")


@pytest.mark.parametrize(
    "answer, ratings",
    [
        ('{"success": 9, "preservation": 8}', [9, 8]),
        (' {"preservation": 8.5, "success": 0}\n', [0, 8.5]),
        ('```\n{"success": 9, "preservation": 8}\n```', [9, 8]),
        ("9, 8", None),
        ("4 out of 5", None),
        ("1. Success: 9\n2. Preservation: 8", None),
        ("[9, 8]", None),
        ('{"success": 9}', None),
        ('{"success": 9, "preservation": 8, "style": 7}', None),
        ('{"success": 9, "success": 9, "preservation": 8}', None),
        ('{"success": "9", "preservation": 8}', None),
        ('{"success": true, "preservation": 8}', None),
        ('{"success": 11, "preservation": 8}', None),
        ('{"success": NaN, "preservation": 8}', None),
        ('I say {"success": 9, "preservation": 8}', None),
        ('{"success": 9, "preservation": 8} of 10', None),
    ],
)
def test_ratings_are_read_from_json_alone(answer, ratings):
    assert read_ratings(answer, ["success", "preservation"], 0, 10) == ratings


def test_yes_and_no_are_read_from_json_alone():
    assert read_yes('{"answer": "yes"}') is True and read_yes('{"answer":"no"}') is False
    for answer in (
        "yes",
        '{"answer": "Yes, if"}',
        '{"answer": true}',
        '{"answer": ["yes"]}',
        '{"yes": "answer"}',
        "[]",
    ):
        assert read_yes(answer) is None


def test_combining():
    assert combine([[1, 3]], "mean", 1, 5) == 0.25
    assert combine([[10, 5], [5, 10]], "geometric mean of minima", 0, 10) == 0.5
