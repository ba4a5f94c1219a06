"""weights/guard.py and weights/policy.py: the prompts of Llama Guard 3 Vision, and its verdicts."""
import json
import shutil
from itertools import product
from pathlib import Path

import pytest
from text_side import CURRENT, IMAGE_PART, refusal, text_part, theirs, user, write

from weights.guard import Guard, Verdict
from weights.policy import Policy
from weights.tokenizer import ChatTokenizer, messages

PUBLISHED = Path(__file__).parent / "data" / "llama_guard_3_vision" / "chat_template.json"
TEMPLATE = json.loads(PUBLISHED.read_text(encoding="utf-8"))["chat_template"]


def agent(text):
    return {"role": "assistant", "content": [text_part(text)]}


QUESTION, ANSWER = [text_part("  What is\nthis? <|eot_id|>\n")], agent("\nA red circle. ")
IMAGED = [IMAGE_PART, text_part("Which colour?")]
CHATS = {"user": [user(QUESTION)], "assistant": [user(QUESTION), ANSWER],
         "user, image": [user(IMAGED)], "assistant, image": [user(IMAGED), ANSWER],
         "later turns": [user(IMAGED), ANSWER, user([text_part("Sure? "), text_part("画像")]), agent("Yes.")]}
POLICIES = {"the guard's": Policy(), "excluded": Policy(excluded=["S1", "S13"]),
            "own": Policy({"S1": "Red <|image|> circles.", "Ä 2": "Two\nlines. "}),
            "own and excluded": Policy({"A": "Squares.", "B": "Circles."}, ("A",))}


@pytest.fixture
def guard(folder, config):
    shutil.copy(PUBLISHED, folder)
    return ChatTokenizer.from_folder(folder, config)


@pytest.mark.parametrize("chat, policy", [*product(CHATS, POLICIES)])
def test_same_tokens_as_transformers(folder, guard, chat, policy):
    turns, policy = CHATS[chat], POLICIES[policy]
    options = {"excluded_category_keys": list(policy.excluded)} if policy.excluded else {}
    if policy.categories:
        options["categories"] = policy.categories
    harmless = json.loads(json.dumps([turns, options]).replace("<|", "<!"))     # transformers would obey them
    theirs_ids = theirs(folder, harmless[0], TEMPLATE, **harmless[1])
    ours = guard.encode(turns, policy=policy)
    assert len([i for i in ours if i in guard.vocabulary.special.values()]) == len(
        [i for i in theirs_ids if i in guard.vocabulary.special.values()])
    harmless_policy = Policy(harmless[1].get("categories"), policy.excluded)
    assert guard.encode(harmless[0], policy=harmless_policy) == theirs_ids
    assert guard.decode(ours) == guard.decode(theirs_ids).replace("<!", "<|")


def test_the_last_turn_is_judged(guard):
    for name, turns in CHATS.items():
        text = guard.decode(guard.encode(turns))
        judged = "Agent" if turns[-1]["role"] == "assistant" else "User"
        assert f"ONLY THE LAST {judged} message" in text, name
    assert "Agent: A red circle.\n\n<END CONVERSATION>" in guard.decode(guard.encode(CHATS["assistant"]))


def test_strings_are_judged_as_parts(guard):
    turns = [user("One?"), {"role": "assistant", "content": "Two."}]
    assert guard.encode(turns) == guard.encode([user([text_part("One?")]), agent("Two.")])


def test_a_guard_knows_its_categories(guard):
    assert list(Guard(guard).categories) == [f"S{i}" for i in range(1, 14)]
    assert Guard(guard).categories["S9"] == "Indiscriminate Weapons."
    assert list(Guard(guard, Policy(excluded=["S2", "S1"])).categories) == [f"S{i}" for i in range(3, 14)]
    own = {"Ä 2": "Two\nlines: <|eot_id|>", "S6": "Six."}
    assert Guard(guard, Policy(own)).categories == own
    assert Guard(guard, Policy(own, ["S6"])).categories == {"Ä 2": own["Ä 2"]}


@pytest.mark.parametrize("policy, words", [
    (Policy(excluded=["S14"]), "the excluded category 'S14' is none of S1, S2, S3,"),
    (Policy(excluded=[f"S{i}" for i in range(1, 14)]), "all categories are excluded"),
    (Policy({"A": "x"}, ["A"]), "all categories are excluded"),
])
def test_a_policy_that_does_not_fit_is_refused(guard, policy, words):
    assert words in refusal(Guard, guard, policy)


@pytest.mark.parametrize("categories, excluded, words", [
    ({}, (), "categories must be a dict with at least one"),
    (["S1"], (), "categories must be a dict"),
    ({"S1": 7}, (), "category 'S1' must be text, not int"),
    ({1: "x"}, (), "key of a category must be text, not int"),
    ({" ": "x"}, (), "the key of the category 'x' is empty"),
    ({"S1": " \n"}, (), "the category 'S1' is empty"),
    ({"S1": "x\udce9"}, (), "not valid Unicode"),
    ({"S1": "x"}, ("S2",), "the excluded category 'S2' is none of S1"),
    (None, "S1", "excluded categories must be a list of keys, not 'S1'"),
    (None, [1], "key of an excluded category must be text, not int"),
])
def test_odd_policies_are_refused(categories, excluded, words):
    assert words in refusal(Policy, categories, excluded)


@pytest.mark.parametrize("policy", ["S1", {"S1": "x"}, 7])
def test_what_is_no_policy_is_refused(guard, policy):
    assert "not a Policy: make one" in refusal(Guard, guard, policy)
    assert "not a Policy: make one" in refusal(guard.encode, messages("x"), policy=policy)


def test_other_models_are_no_guards(folder, base_folder, config):
    for place in folder, base_folder:
        tokenizer = ChatTokenizer.from_folder(place, config)
        assert "take a guard, as meta-llama/Llama-Guard-3-11B-Vision" in refusal(Guard, tokenizer)
    write(folder, chat_template__jinja=CURRENT)
    assert "take a guard" in refusal(Guard, ChatTokenizer.from_folder(folder, config))


@pytest.mark.parametrize("policy", [Policy({"S1": "Mine."}), Policy(excluded=["S1"])])
def test_a_guard_with_fixed_categories_says_so(folder, config, policy):
    fixed = TEMPLATE.replace("categories is not defined", "true")
    write(folder, chat_template__jinja=fixed.replace("key not in excluded_category_keys", "true"))
    tokenizer = ChatTokenizer.from_folder(folder, config)
    assert len(Guard(tokenizer).categories) == 13
    assert "fixed categories: give none, exclude none" in refusal(Guard, tokenizer, policy)


@pytest.mark.parametrize("text, verdict, line", [
    ("safe", Verdict(True, {}), "safe"),
    ("\n\nsafe\n", Verdict(True, {}), "safe"),
    ("\n\nunsafe\nS1", Verdict(False, {"S1": "Violent Crimes."}), "unsafe: S1 Violent Crimes"),
    ("unsafe\nS10, S2,\n", Verdict(False, {"S10": "Hate.", "S2": "Non-Violent Crimes."}),
     "unsafe: S10 Hate, S2 Non-Violent Crimes"),
    ("unsafe", Verdict(False, {}), "unsafe"),
    ("unsafe\nS77", Verdict(False, {"S77": None}), "unsafe: S77"),
])
def test_verdicts_are_read(guard, text, verdict, line):
    assert Guard(guard).read([text]) == [verdict] and str(verdict) == line


@pytest.mark.parametrize("text", ["", "\n", "Safe.", "safe\nS1", "unsafe\nS1\nS2", "a circle", "unsafe S1"])
def test_an_answer_that_is_no_verdict_is_refused(guard, text):
    assert f"the guard's answer is neither safe nor unsafe: {text!r}" in refusal(Guard(guard).read, [text])
    assert "the guard's answer 2 is neither" in refusal(Guard(guard).read, ["safe", text])


def test_the_template_asks_for_users_and_assistants_in_turns(guard):
    assert "Conversation roles must alternate" in refusal(guard.encode, messages("x", system="y"))
    assert "writes 1 <|image|> for 2 images" in refusal(guard.encode, messages("x", images=2))
