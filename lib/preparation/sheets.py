"""The contact sheet of a training set: every image, small, with its source's name, in pages."""

from PIL import Image

from lib.images import contact_sheet

A_PAGE = 200  # thumbnails


def write_sheets(folder, views, titles):
    """Write contact_sheet.jpg into `folder` or, where one page does not hold all, contact_sheet_01.jpg and so
    on; return the first one's path. `views` are paths of thumbnails, `titles` what stands under each."""
    pages = [(views[i : i + A_PAGE], titles[i : i + A_PAGE]) for i in range(0, len(views), A_PAGE)]
    digits = max(2, len(str(len(pages))))
    names = ["contact_sheet.jpg"]
    if len(pages) > 1:
        names = [f"contact_sheet_{number:0{digits}}.jpg" for number in range(1, len(pages) + 1)]
    for name, (paths, words) in zip(names, pages, strict=True):
        images = []
        for path in paths:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        contact_sheet(images, words).save(folder / name, quality=88)
    return names[0]
