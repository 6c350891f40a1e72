/* What Python calls: every length is compared with the shape first, and Python is left alone (no GIL) while the work is done. */

/* A buffer of at least `bytes` bytes, at an address that is a multiple of `unit`; 0 and an exception where it is not. */
static int take(PyObject *from, Py_buffer *to, int flags, int64_t bytes, size_t unit, const char *name)
{
    if (PyObject_GetBuffer(from, to, flags) < 0)
        return 0;
    if (to->len >= bytes && (uintptr_t)to->buf % unit == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s has %zd bytes where %lld were expected", name, to->len, (long long)bytes);
    PyBuffer_Release(to);
    return 0;
}

static const int sizes[] = {4, 2, 2, 1};
static const int64_t limit = INT64_C(1) << 40;

/* What is read are bytes, whose values `table` holds. */
static void of_bytes(input *in, const uint16_t *table)
{
    in->table = table;
    in->kind = FLOAT32; /* once they are widened */
    in->single = 1;
    for (int i = 0; i < 256; i++) {
        const uint32_t bits = (uint32_t)(table[i] & 0x7fff) << 16;
        float value;
        memcpy(&value, &bits, 4);
        in->single &= value == 0 || !isfinite(value) || (SMALLEST < value && value < LARGEST);
    }
}

/* Whether there can be a matrix of this shape: then no product with the size of an element leaves its type. */
static int possible(int64_t rows, int64_t columns)
{
    return rows >= 0 && columns >= 0 && rows <= limit && columns <= limit && (!columns || rows <= (limit >> 8) / columns);
}

static int pass_arguments(PyObject *args, input *in, Py_buffer views[4], int *used, int *level)
{
    Py_ssize_t rows, columns, top, all;
    PyObject *data, *table, *odd, *sums;
    if (!PyArg_ParseTuple(args, "iOnnOOOnni", &in->kind, &data, &rows, &columns, &table, &odd, &sums, &top, &all, level))
        return 0;
    if (in->kind < FLOAT32 || in->kind > BYTE || !possible(rows, columns) || top < 0 || all < rows || top > all - rows ||
        all > limit) {
        PyErr_SetString(PyExc_ValueError, "an unknown kind or an impossible shape");
        return 0;
    }
    const int64_t size = sizes[in->kind];
    if (!take(data, &views[(*used)++], PyBUF_SIMPLE, rows * columns * size, 1, "data"))
        return --*used, 0;
    in->data = views[0].buf, in->rows = rows, in->columns = columns;
    if (in->kind == BYTE) {
        if (!take(table, &views[(*used)++], PyBUF_SIMPLE, 512, 2, "table"))
            return --*used, 0;
        of_bytes(in, views[*used - 1].buf);
    }
    if (sums == Py_None)
        return 1;
    if (!take(odd, &views[(*used)++], PyBUF_SIMPLE, (columns * size + 7) / 8 * 8, 8, "odd"))
        return --*used, 0;
    in->odd = views[*used - 1].buf;
    if (!take(sums, &views[(*used)++], PyBUF_WRITABLE, (3 * all + 2 * columns) * 8, 8, "sums"))
        return --*used, 0;
    double *to = views[*used - 1].buf;
    in->row_sums = to + top, in->row_squares = to + all + top, in->row_hashes = (uint64_t *)(to + 2 * all) + top;
    in->column_sums = to + 3 * all, in->column_squares = to + 3 * all + columns;
    return 1;
}

static int level_of(int asked)
{
    return asked < 0 || asked >= best.levels ? best.levels - 1 : asked;
}

static PyObject *kernel_measure(PyObject *self, PyObject *args)
{
    (void)self;
    input in = {.widen = best.widen};
    output out = {0};
    Py_buffer views[4];
    PyObject *found = NULL;
    int used = 0, level = 0;
    if (pass_arguments(args, &in, views, &used, &level)) {
        double n[6];
        int64_t c[4];
        level = level_of(level);
        Py_BEGIN_ALLOW_THREADS
        measure(&in, &out, best.pass[level]);
        Py_END_ALLOW_THREADS
        central(&in, &out, n, c);
        found = Py_BuildValue("LddddddLLL", (long long)c[0], n[0], n[1], n[2], n[3], n[4], n[5], (long long)c[1],
                              (long long)c[2], (long long)c[3]);
    }
    while (used)
        PyBuffer_Release(&views[--used]);
    return found;
}

/* Where a tensor begins, in bytes, and its shape. */
typedef struct {
    int64_t offset, rows, columns;
} place;

/* How many sums are kept of a tensor: none of a single row or column. */
static int64_t sums_of(const place *at)
{
    return at->rows > 1 && at->columns > 1 ? 3 * at->rows + 2 * at->columns : 0;
}

/* Whether every tensor lies within `bytes` and its sums within `room`, and its rows are no longer than the factors reach. */
static int places_fit(const place *at, int64_t count, int64_t size, int64_t bytes, int64_t reach, int64_t room)
{
    for (; count > 0; count--, at++) {
        const int64_t rows = at->rows, columns = at->columns;
        if (!possible(rows, columns) || at->offset < 0 || at->offset > bytes || rows * columns * size > bytes - at->offset)
            return 0;
        const int64_t needed = sums_of(at);
        if (needed > room || (needed && columns * size > reach * 8))
            return 0;
        room -= needed;
    }
    return 1;
}

/* Where the sums of each of several tensors begin, in `starts`, and how many there are of all. */
static PyObject *kernel_lay_out(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *places, *starts, *found = NULL;
    Py_buffer views[2];
    int used = 0;
    if (!PyArg_ParseTuple(args, "OO", &places, &starts))
        return NULL;
    if (take(places, &views[0], PyBUF_SIMPLE, 0, 8, "places") && ++used) {
        const place *at = views[0].buf;
        const int64_t count = views[0].len / (int64_t)sizeof *at;
        if (take(starts, &views[1], PyBUF_WRITABLE, count * 8, 8, "starts") && ++used) {
            int64_t *start = views[1].buf, room = 0, i = 0;
            for (; i < count && room <= limit && possible(at[i].rows, at[i].columns); i++)
                start[i] = room, room += sums_of(&at[i]);
            found = i == count ? PyLong_FromLongLong(room) : NULL;
            if (!found)
                PyErr_SetString(PyExc_ValueError, "an impossible shape");
        }
    }
    while (used)
        PyBuffer_Release(&views[--used]);
    return found;
}

/* Each of several tensors; its sums follow those of the one before. */
static void measure_each(const input *as, const char *data, const place *at, int64_t count, passer *pass, double *numbers,
                         int64_t *counts, double *sums)
{
    input in = *as;
    for (int64_t i = 0; i < count; i++) {
        output out = {0};
        const int64_t rows = at[i].rows, columns = at[i].columns, room = sums_of(&at[i]);
        in.data = data + at[i].offset, in.rows = rows, in.columns = columns;
        in.row_sums = NULL;
        if (room) {
            memset(sums + 3 * rows, 0, (size_t)(2 * columns) * sizeof *sums); /* what is added to; rows are written */
            in.row_sums = sums, in.row_squares = sums + rows, in.row_hashes = (uint64_t *)(sums + 2 * rows);
            in.column_sums = sums + 3 * rows, in.column_squares = in.column_sums + columns;
            sums += room;
        }
        measure(&in, &out, pass);
        central(&in, &out, numbers + 6 * i, counts + 4 * i);
    }
}

/* Several tensors of one kind that lie in the same bytes: the moments and the sums of each, in one call. */
static PyObject *kernel_measure_many(PyObject *self, PyObject *args)
{
    (void)self;
    input in = {.widen = best.widen};
    int kind, level, used = 0;
    PyObject *data, *table, *odd, *places, *numbers, *counts, *sums, *found = NULL;
    Py_buffer views[7];
    if (!PyArg_ParseTuple(args, "iOOOOOOOi", &kind, &data, &table, &odd, &places, &numbers, &counts, &sums, &level))
        return NULL;
    if (kind < FLOAT32 || kind > BYTE)
        return PyErr_SetString(PyExc_ValueError, "an unknown kind"), NULL;
    if (take(data, &views[0], PyBUF_SIMPLE, 0, 1, "data") && ++used && take(odd, &views[1], PyBUF_SIMPLE, 0, 8, "odd") && ++used &&
        take(places, &views[2], PyBUF_SIMPLE, 0, 8, "places") && ++used) {
        const place *at = views[2].buf;
        const int64_t count = views[2].len / (int64_t)sizeof *at, size = sizes[kind];
        if (take(numbers, &views[3], PyBUF_WRITABLE, count * 6 * 8, 8, "numbers") && ++used &&
            take(counts, &views[4], PyBUF_WRITABLE, count * 4 * 8, 8, "counts") && ++used &&
            take(sums, &views[5], PyBUF_WRITABLE, 0, 8, "sums") && ++used &&
            (kind != BYTE || (take(table, &views[6], PyBUF_SIMPLE, 512, 2, "table") && ++used))) {
            in.kind = kind, in.odd = views[1].buf;
            if (kind == BYTE)
                of_bytes(&in, views[6].buf);
            if (places_fit(at, count, size, views[0].len, views[1].len / 8, views[5].len / 8)) {
                Py_BEGIN_ALLOW_THREADS
                measure_each(&in, views[0].buf, at, count, best.pass[level_of(level)], views[3].buf, views[4].buf, views[5].buf);
                Py_END_ALLOW_THREADS
                found = Py_NewRef(Py_None);
            } else {
                PyErr_SetString(PyExc_ValueError, "a tensor that does not lie within what was given");
            }
        }
    }
    while (used)
        PyBuffer_Release(&views[--used]);
    return found;
}

static PyObject *kernel_survey(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *data;
    Py_buffer view;
    int level;
    double out[4];
    if (!PyArg_ParseTuple(args, "Oi", &data, &level) || !take(data, &view, PyBUF_SIMPLE, 0, 1, "data"))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    best.survey[level_of(level)](view.buf, view.len / 4, out);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return Py_BuildValue("dddd", out[0], out[1], out[2], out[3]);
}

/* Whether a product of these is a number of elements that there can be; 0 and an exception where it is not. */
static int few(int64_t count, int64_t width)
{
    if (width == 0 || count <= limit / width)
        return 1;
    PyErr_SetString(PyExc_ValueError, "an impossible shape");
    return 0;
}

/* Rows `places` of a matrix, from column `left` on, as float32 rows of `width`. */
static PyObject *kernel_gather(PyObject *self, PyObject *args)
{
    (void)self;
    int kind, level, used = 0;
    Py_ssize_t rows, columns, left, width;
    PyObject *data, *table, *places, *to, *found = NULL;
    Py_buffer views[4];
    if (!PyArg_ParseTuple(args, "iOnnOOnnOi", &kind, &data, &rows, &columns, &table, &places, &left, &width, &to, &level))
        return NULL;
    if (kind < FLOAT32 || kind > BYTE || rows < 0 || columns < 0 || rows > limit || columns > limit ||
        (columns && rows > (limit << 8) / columns) || left < 0 || width < 0 || width > columns || left > columns - width)
        return PyErr_SetString(PyExc_ValueError, "an unknown kind or an impossible shape"), NULL;
    const int64_t size = sizes[kind];
    if (take(data, &views[0], PyBUF_SIMPLE, rows * columns * size, 1, "data") && ++used &&
        take(places, &views[1], PyBUF_SIMPLE, 0, 8, "places") && ++used && few(views[1].len / 8, width) &&
        take(to, &views[2], PyBUF_WRITABLE, views[1].len / 8 * width * 4, 4, "to") && ++used &&
        (kind != BYTE || (take(table, &views[3], PyBUF_SIMPLE, 512, 2, "table") && ++used))) {
        const int64_t *place = views[1].buf, count = views[1].len / 8;
        int64_t i = 0;
        Py_BEGIN_ALLOW_THREADS
        for (; i < count && 0 <= place[i] && place[i] < rows; i++) {
            const char *from = (const char *)views[0].buf + (place[i] * columns + left) * size;
            float *row = (float *)views[2].buf + i * width;
            if (kind == BYTE)
                best.widen(row, (const uint8_t *)from, width, 0, views[3].buf);
            else
                best.convert[level_of(level)](kind, from, width, row);
        }
        Py_END_ALLOW_THREADS
        if (i == count)
            found = Py_NewRef(Py_None);
        else
            PyErr_Format(PyExc_ValueError, "there is no row %lld of %zd", (long long)place[i], rows);
    }
    while (used)
        PyBuffer_Release(&views[--used]);
    return found;
}

static PyObject *kernel_krylov(PyObject *self, PyObject *args)
{
    (void)self;
    int level, used = 0;
    Py_ssize_t rows, columns, steps;
    PyObject *block, *basis, *images, *found = NULL;
    Py_buffer views[3];
    if (!PyArg_ParseTuple(args, "OnnnOOi", &block, &rows, &columns, &steps, &basis, &images, &level))
        return NULL;
    const int64_t most = 1 << 20;
    if (rows < 0 || columns < 0 || steps < 0 || rows > most || columns > most || steps > most)
        return PyErr_SetString(PyExc_ValueError, "an impossible shape"), NULL;
    if (take(block, &views[0], PyBUF_SIMPLE, rows * columns * 4, 4, "block") && ++used &&
        take(basis, &views[1], PyBUF_WRITABLE, (steps + 1) * columns * 4, 4, "basis") && ++used &&
        take(images, &views[2], PyBUF_WRITABLE, steps * rows * 4, 4, "images") && ++used) {
        int64_t made;
        Py_BEGIN_ALLOW_THREADS
        made = best.krylov[level_of(level)](views[0].buf, rows, columns, steps, views[1].buf, views[2].buf);
        Py_END_ALLOW_THREADS
        found = PyLong_FromLongLong(made);
    }
    while (used)
        PyBuffer_Release(&views[--used]);
    return found;
}
