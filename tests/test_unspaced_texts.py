"""Scripts without spaces: each clause would be one word."""

import warnings

import pytest

import ulmfit_fast as uf
from ulmfit_fast.text import warn_of_unspaced

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.cpu_only("text is made on the host")
ENGLISH = "The film was a fine one, and its end finer than the film of the year before."
UNSPACED = {
    "Chinese": "今天的天气非常好我们一起去公园散步吧，然后再去看一场好看的电影。",
    "Japanese": "今日はとても天気がいいので公園へ散歩に行きましょう。映画を見に行くのもいいですね。",
    "Thai": "วันนี้อากาศดีมากเราไปเดินเล่นที่สวนสาธารณะกันเถอะ แล้วก็ไปดูหนังเรื่องใหม่ด้วยกัน",
}
SPACED = {
    "Chinese": "今天 的 天气 非常 好 我们 一起 去 公园 散步 吧 ， 然后 再 去 看 一 场 好看 的 电影 。",
    "Japanese": "今日 は とても 天気 が いい ので 公園 へ 散歩 に 行く 。 コーヒー を 飲む 。",
    "loanwords": "コンピューター の プログラミング は インターネット で 学習 する こと が できる 。",
    "Thai": "วันนี้ อากาศ ดี มาก เรา ไป เดินเล่น ที่ สวนสาธารณะ กัน เถอะ แล้วก็ ไป ดู หนัง เรื่อง ใหม่ ด้วยกัน",
    "Korean": "오늘은 날씨가 아주 좋으니 공원으로 산책을 가고 나서 영화를 봅시다.",
    "German": "Donaudampfschifffahrtsgesellschaftskapitäne und Rechtsschutzversicherungsgesellschaften.",
    "Hindi": "आज मौसम बहुत अच्छा है, चलो पार्क में घूमने चलते हैं।",
    "a little Chinese": f"{ENGLISH} {ENGLISH} 今天的天气非常好",
    "none": "",
}


@pytest.mark.parametrize("language", UNSPACED)
def test_a_text_without_spaces_is_warned_of(language):
    with pytest.warns(UserWarning, match="texts has no spaces between words in .*Cut the texts into words"):
        warn_of_unspaced([UNSPACED[language], ENGLISH[:20], "", "!"] * 3000, "texts")


@pytest.mark.parametrize("language", SPACED)
def test_a_text_with_spaces_is_not(language):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for texts in ([], [SPACED[language]], [SPACED[language]] * 3000):
            warn_of_unspaced(texts, "texts")


def test_the_stages_warn_once(tmp_path):
    options = dict(preset="tiny", epochs=1, batch_size=2, bptt=8, progress=False)
    texts = list(UNSPACED.values()) * 20
    with pytest.warns(UserWarning, match="sources has no spaces") as said:
        lm = uf.pretrain_lm(texts, tmp_path / "lm", **options)
    assert len(said) == 1 and said[0].filename == __file__
    del options["bptt"]
    with pytest.warns(UserWarning, match="texts has no spaces") as said:
        uf.train_classifier(lm, texts, [0, 1, 2] * 20, tmp_path / "clf", **options)
    assert len(said) == 1 and said[0].filename == __file__
