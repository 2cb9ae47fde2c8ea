/* chart.h - line charts as SVG, which any browser shows: a logarithmic x axis to base 2, a linear y axis, error bars.
 *
 *     Chart chart = {.title = "Loss by context", .x_label = "context", .y_label = "bits per byte", ...};
 *     chart_write(file, &chart, 1);
 *
 * Charts stand below one another in one picture. Colours are dark on white and differ in lightness too.
 */
#ifndef LIB_CHART_H
#define LIB_CHART_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { CHART_WIDTH = 760, CHART_HEIGHT = 430, CHART_LEFT = 84, CHART_RIGHT = 28, CHART_TOP = 62, CHART_BOTTOM = 74,
       CHART_SERIES = 4, CHART_TICKS = 12 };

typedef struct ChartSeries {
    const char *label;
    const double *x, *y, *error;     /* count numbers each; x > 0; error NULL or NAN: no bar */
    int count;
} ChartSeries;

typedef struct Chart {
    const char *title, *note;        /* the note is a line of small print under the title */
    const char *x_label, *y_label;
    ChartSeries series[CHART_SERIES];
    int num_series;
    double level;                    /* a dashed horizontal line; NAN: none */
    const char *level_label;
} Chart;

/* What the axes show, and where that is in the picture. */
typedef struct ChartFrame {
    double x_low, x_high;            /* log2 */
    double y_low, y_high, y_step;
    double top;                      /* of this chart in the picture */
} ChartFrame;

static inline double chart_x(const ChartFrame *f, double x) {
    return CHART_LEFT + (log2(x) - f->x_low) / (f->x_high - f->x_low) * (CHART_WIDTH - CHART_LEFT - CHART_RIGHT);
}

static inline double chart_y(const ChartFrame *f, double y) {
    return f->top + CHART_HEIGHT - CHART_BOTTOM
         - (y - f->y_low) / (f->y_high - f->y_low) * (CHART_HEIGHT - CHART_TOP - CHART_BOTTOM);
}

/* Text as XML wants it. Bytes under 32 have no place in XML and become spaces. */
static inline void chart_escape(FILE *file, const char *text) {
    for (; *text; text++) {
        if (*text == '&') fputs("&amp;", file);
        else if (*text == '<') fputs("&lt;", file);
        else if (*text == '>') fputs("&gt;", file);
        else fputc((unsigned char)*text < 32 ? ' ' : *text, file);
    }
}

static inline void chart_text(FILE *file, double x, double y, const char *style, const char *text) {
    fprintf(file, "<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, style);
    chart_escape(file, text);
    fputs("</text>\n", file);
}

/* 1K, 4K, 2M where a power of two has such a name, else the number; out has room for 32 bytes. Returns out. */
static inline const char *chart_number(int64_t n, char *out) {
    if (n >= (int64_t)1 << 20 && n % ((int64_t)1 << 20) == 0) snprintf(out, 32, "%lldM", (long long)(n >> 20));
    else if (n >= 1 << 10 && n % (1 << 10) == 0) snprintf(out, 32, "%lldK", (long long)(n >> 10));
    else snprintf(out, 32, "%lld", (long long)n);
    return out;
}

/* A step of 1, 2 or 5 times a power of ten that divides `span` into about five. */
static inline double chart_step(double span) {
    double power = pow(10, floor(log10(span / 5))), rest = span / 5 / power;
    return power * (rest < 1.5 ? 1 : rest < 3.5 ? 2 : rest < 7.5 ? 5 : 10);
}

/* Finds limits that hold every point with its error bar. */
static inline ChartFrame chart_frame(const Chart *chart, double top) {
    ChartFrame f = {INFINITY, -INFINITY, INFINITY, -INFINITY, 1, top};
    for (int s = 0; s < chart->num_series; s++) {
        const ChartSeries *line = &chart->series[s];
        for (int i = 0; i < line->count; i++) {
            double bar = line->error && isfinite(line->error[i]) ? line->error[i] : 0;
            f.x_low = fmin(f.x_low, log2(line->x[i]));
            f.x_high = fmax(f.x_high, log2(line->x[i]));
            f.y_low = fmin(f.y_low, line->y[i] - bar);
            f.y_high = fmax(f.y_high, line->y[i] + bar);
        }
    }
    if (isfinite(chart->level)) {
        f.y_low = fmin(f.y_low, chart->level);
        f.y_high = fmax(f.y_high, chart->level);
    }
    /* A flat line still wants some height: a thousandth of its value. */
    double least = fmax(1e-3 * fabs(f.y_high), 1e-9), span = fmax(f.y_high - f.y_low, least);
    f.y_step = chart_step(span);
    f.y_low -= 0.08 * span;
    f.y_high += 0.08 * span;
    f.x_low -= 0.3;
    f.x_high += 0.3;
    return f;
}

static inline void chart_axes(FILE *file, const Chart *chart, const ChartFrame *f) {
    static const char end[] = "text-anchor=\"end\"", middle[] = "text-anchor=\"middle\"";
    double bottom = f->top + CHART_HEIGHT - CHART_BOTTOM, right = CHART_WIDTH - CHART_RIGHT;
    char text[64];
    int digits = f->y_step < 1 ? (int)ceil(-log10(f->y_step) - 1e-9) : 0;
    for (double tick = ceil(f->y_low / f->y_step); tick * f->y_step <= f->y_high; tick++) {
        double value = tick * f->y_step, y = chart_y(f, value);
        fprintf(file, "<line x1=\"%d\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"#e3e3e3\"/>\n", CHART_LEFT, y,
                right, y);
        snprintf(text, sizeof text, "%.*f", digits, value);
        chart_text(file, CHART_LEFT - 8, y + 4, end, text);
    }
    int first = (int)ceil(f->x_low), last = (int)floor(f->x_high), every = (last - first) / CHART_TICKS + 1;
    for (int power = first; power <= last; power += every) {
        double x = chart_x(f, ldexp(1, power));
        fprintf(file, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"#333333\"/>\n", x, bottom, x,
                bottom + 5);
        chart_text(file, x, bottom + 20, middle, chart_number((int64_t)1 << power, text));
    }
    fprintf(file, "<line x1=\"%d\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"#333333\"/>\n", CHART_LEFT, bottom,
            right, bottom);
    chart_text(file, (CHART_LEFT + right) / 2, bottom + 44, middle, chart->x_label);
    fprintf(file, "<g transform=\"translate(22 %.1f) rotate(-90)\">", f->top + (CHART_TOP + CHART_HEIGHT
            - CHART_BOTTOM) / 2.);
    chart_text(file, 0, 0, middle, chart->y_label);
    fputs("</g>\n", file);
}

static inline void chart_line(FILE *file, const ChartSeries *line, const ChartFrame *f, const char *colour) {
    fprintf(file, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2\" points=\"", colour);
    for (int i = 0; i < line->count; i++)
        fprintf(file, "%s%.1f,%.1f", i ? " " : "", chart_x(f, line->x[i]), chart_y(f, line->y[i]));
    fputs("\"/>\n", file);
    for (int i = 0; i < line->count; i++) {
        double x = chart_x(f, line->x[i]), y = chart_y(f, line->y[i]);
        if (line->error && isfinite(line->error[i])) {
            double high = chart_y(f, line->y[i] + line->error[i]), low = chart_y(f, line->y[i] - line->error[i]);
            fprintf(file, "<path stroke=\"%s\" stroke-width=\"1.2\" d=\"M%.1f %.1fV%.1fM%.1f %.1fh8M%.1f %.1fh8\"/>\n",
                    colour, x, low, high, x - 4, low, x - 4, high);
        }
        fprintf(file, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.6\" fill=\"%s\"/>\n", x, y, colour);
    }
}

static inline void chart_write_one(FILE *file, const Chart *chart, double top) {
    static const char *const colours[CHART_SERIES] = {"#1f5fa8", "#d1495b", "#2a9d6f", "#6b4e9b"};
    ChartFrame f = chart_frame(chart, top);
    char style[64];
    chart_text(file, CHART_LEFT, top + 26, "font-size=\"16\" font-weight=\"bold\"", chart->title);
    if (chart->note) chart_text(file, CHART_LEFT, top + 45, "fill=\"#666666\" font-size=\"12\"", chart->note);
    chart_axes(file, chart, &f);
    if (isfinite(chart->level)) {
        double y = chart_y(&f, chart->level);
        fprintf(file, "<line x1=\"%d\" y1=\"%.1f\" x2=\"%d\" y2=\"%.1f\" stroke=\"#666666\" "
                "stroke-dasharray=\"5 4\"/>\n", CHART_LEFT, y, CHART_WIDTH - CHART_RIGHT, y);
        chart_text(file, CHART_LEFT + 6, y - 6, "fill=\"#666666\"", chart->level_label);
    }
    for (int s = 0; s < chart->num_series; s++) chart_line(file, &chart->series[s], &f, colours[s]);
    /* The legend stands above the lines, at the right, where no line can cross it. */
    for (int s = 0; s < chart->num_series && chart->num_series > 1; s++) {
        double y = top + 20 + (CHART_TOP - 14.) / CHART_SERIES * 1.3 * s;
        fprintf(file, "<circle cx=\"%d\" cy=\"%.1f\" r=\"3.6\" fill=\"%s\"/>\n", CHART_WIDTH - CHART_RIGHT - 8, y - 4,
                colours[s]);
        snprintf(style, sizeof style, "text-anchor=\"end\" fill=\"%s\"", colours[s]);
        chart_text(file, CHART_WIDTH - CHART_RIGHT - 18, y, style, chart->series[s].label);
    }
}

/* Writes the charts as one SVG document. Every series has a point. The caller sees to errors of the file. */
static inline void chart_write(FILE *file, const Chart *charts, int count) {
    fprintf(file, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
            "font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#333333\">\n", CHART_WIDTH,
            CHART_HEIGHT * count, CHART_WIDTH, CHART_HEIGHT * count);
    fputs("<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n", file);
    for (int i = 0; i < count; i++) chart_write_one(file, &charts[i], (double)i * CHART_HEIGHT);
    fputs("</svg>\n", file);
}

#endif
