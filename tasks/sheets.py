"""
Contact sheets, as PIL images: captions.png, pictures with what was said over them and what the
model says; toolbox.png, items of the Toolbox with their pictures and answers.
"""

from PIL import Image, ImageDraw, ImageFont

INK, SOFT, GOOD, WRONG = "#17181c", "#62656d", "#1a7f43", "#c2410c"
SIDE, GAP = 150, 14  # of a picture, in pixels


def font_of(size):
    return ImageFont.load_default(size)


def wrap(text, width, font):
    """The lines of a text that are at most so many pixels wide; a word is cut only if it is wider
    than a line by itself."""
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width:
            cut = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width)
            lines += [line] if line else []
            lines.append(word[:cut])
            line, word = "", word[cut:]
        longer = f"{line} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line] if line or not lines else lines


def draw_mark(draw, x, y, right):
    """A tick or a cross, 9 pixels a side."""
    if right:
        draw.line([(x, y + 5), (x + 3, y + 9), (x + 9, y)], GOOD, 2)
    else:
        draw.line([(x, y), (x + 9, y + 9)], WRONG, 2)
        draw.line([(x + 9, y), (x, y + 9)], WRONG, 2)


def contact_sheet(entries, columns=6):
    """A PIL image of page.Captions: each picture above what was said over it (grey) and the model's
    caption, with a tick or a cross if it can be judged."""
    font = font_of(13)
    texts = [(wrap(e.text, SIDE, font), wrap(e.said, SIDE - 14, font)) for e in entries]
    starts = range(0, len(entries), columns)
    rows = [texts[i : i + columns] for i in starts]
    heights = [SIDE + 16 + 17 * max(len(a) + len(b) for a, b in row) + GAP for row in rows]
    page = Image.new("RGB", ((SIDE + GAP) * columns + GAP, sum(heights) + GAP), "white")
    draw, top = ImageDraw.Draw(page), GAP
    for first, row, height in zip(starts, rows, heights):
        for i, (text, said) in enumerate(row):
            entry, x, y = entries[first + i], GAP + (SIDE + GAP) * i, top + SIDE + 6
            frame = Image.fromarray(entry.frame)
            page.paste(frame.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, top))
            draw.multiline_text((x, y), "\n".join(text), SOFT, font, spacing=3)
            y += 17 * len(text) + 4
            if entry.right is not None:
                draw_mark(draw, x, y + 3, entry.right)
            left = x + (14 if entry.right is not None else 0)
            ink = WRONG if entry.right is False else INK
            draw.multiline_text((left, y), "\n".join(said), ink, font, spacing=3)
        top += height
    return page


def example_sheet(items, most=9):
    """A PIL image with a block for each item (test, frames, question, right answer, model's
    answer): its last nine pictures, numbered, or lettered if the question has letters; the
    question; the right answer and the model's, ticked if they are the same."""
    font, bold, side = font_of(14), font_of(16), 112
    width = (side + 8) * most + 2 * GAP
    blocks = []
    for test, frames, question, right, said in items:
        words = question.replace("<image>", "").replace("\n", " ")
        blocks.append(
            (test, frames[-most:], wrap(words, width - 2 * GAP, font), right, said, words)
        )
    heights = [24 + side + 26 + 19 * len(lines) + 24 + GAP for _, _, lines, *_ in blocks]
    page = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw, y = ImageDraw.Draw(page), GAP
    for (test, frames, lines, right, said, words), height in zip(blocks, heights):
        draw.text((GAP, y), test.replace("_", " "), INK, bold)
        letters = label_pictures(len(frames), words)
        for i, (frame, letter) in enumerate(zip(frames, letters)):
            x = GAP + (side + 8) * i
            page.paste(Image.fromarray(frame).resize((side, side)), (x, y + 24))
            draw.text((x + side / 2, y + 24 + side + 3), letter, SOFT, font, anchor="ma")
        below = y + 24 + side + 24
        draw.multiline_text((GAP, below), "\n".join(lines), INK, font, spacing=4)
        below += 19 * len(lines) + 4
        is_right = said.strip().lower().rstrip(" .)").lstrip("(") == right.strip().lower()
        draw_mark(draw, GAP, below + 4, is_right)
        answer = f"it says: {said}" if said else "it says nothing"
        draw.text(
            (GAP + 16, below), f"{answer}   (right: {right})", GOOD if is_right else WRONG, font
        )
        y += height
    return page


def label_pictures(count, question):
    """What stands below each of so many pictures: the letters of the question's options, for the
    last pictures; numbers if it has none, and there are several pictures."""
    letters = [letter for letter in "ABCDEFGH" if f"({letter})" in question]
    if letters and len(letters) <= count:
        return [""] * (count - len(letters)) + [f"({letter})" for letter in letters]
    return [str(number) for number in range(1, count + 1)] if count > 1 else [""]
