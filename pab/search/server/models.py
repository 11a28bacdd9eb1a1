"""Requests and responses of the REST interface."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from pab.search.server.ids import IMAGE_ID

LONGEST_TEXT = 2_000  # characters; most tokenizers use far fewer
LONGEST_NAME = 4_096  # characters; Linux allows as many bytes in a path
MOST_MINUS = 8
MOST_RESULTS = 100  # per request
DEEPEST = 10_000  # maximum number of results of a query, over all of its pages
MOST_MARKS = 5_000
UPLOAD_ID = r"^upload-[0-9a-f]{32}$"

Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1_000, allow_inf_nan=False)]
ImageId = Annotated[str, Field(pattern=IMAGE_ID)]


class Strict(BaseModel):
    """Model that rejects unknown fields."""

    model_config = ConfigDict(extra="forbid")


class SearchRequest(Strict):
    """Query: a text, an image, or both."""

    text: Text | None = Field(None, description="Description of the picture")
    image: str | None = Field(
        None, pattern=f"{IMAGE_ID}|{UPLOAD_ID}",
        description="Id of an image of the index, or of an earlier upload to this server",
    )  # fmt: skip
    minus: list[Text] = Field([], max_length=MOST_MINUS, description="Unwanted content")
    weights: dict[Literal["text", "image", "minus"], Weight] = Field(
        {}, description="Weights of the parts; 1 by default"
    )
    folder: str = Field("", max_length=LONGEST_NAME, description="Folder to search")
    start_s: Number | None = Field(None, description="First time stamp in a video, seconds")
    end_s: Number | None = Field(None, description="Last time stamp in a video, seconds")
    least: Number | None = Field(None, description="Smallest score of a result")
    rerank: StrictBool | None = Field(
        None, description="Re-rank the first images with a cross encoder, by the text; null "
        "re-ranks if the server has a reranker",
    )  # fmt: skip
    offset: int = Field(0, ge=0, le=DEEPEST, description="Results to skip")
    limit: int = Field(40, ge=1, le=MOST_RESULTS, description="Results to return")


class Picture(BaseModel):
    """Image of the index."""

    id: str
    name: str = Field(description="Path relative to the source of the index")
    time_s: float | None = Field(description="Time stamp in a video, seconds")
    width: int | None
    height: int | None
    caption: str | None


class Result(Picture):
    """Image found by a query."""

    rank: int = Field(description="From 1")
    score: float
    scores: dict[str, float] = Field(description="Similarity of each member")
    rerank_score: float | None = Field(
        description="Score of the reranker; null for an image that was not re-ranked"
    )


class SearchResponse(BaseModel):
    """Results of a query, best first."""

    indexed: int = Field(description="Images in the index")
    image: str | None = Field(description="Id of the query image, for requests for more results")
    next: int | None = Field(description="Offset of the next results; null at the end")
    milliseconds: float = Field(description="Time of the search, without time in the queue")
    results: list[Result]


class Health(BaseModel):
    """State of the server."""

    status: Literal["ok"]
    version: str
    images: int
    members: list[str]
    rerank: bool = Field(description="Whether the server has a reranker")


class Folders(BaseModel):
    """Folders of the index; if there are too many, only those nearest to the source."""

    folders: list[str]
    complete: bool


class Problem(BaseModel):
    """Reason for a failed request, in one sentence."""

    error: str


class Mark(Strict):
    """Mark of an image: right or wrong for a text."""

    text: Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]
    image: ImageId
    right: bool


class MarksRequest(Strict):
    """Marks to convert to an annotation."""

    marks: list[Mark] = Field(min_length=1, max_length=MOST_MARKS)
    form: Literal["labelled", "pairs"] = Field(
        "labelled", description="labelled: one line per image, for evaluation; pairs: one line per "
        "image and text, for tuning",
    )  # fmt: skip
